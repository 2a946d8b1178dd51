"""What commands share: asking before they act, and words for sizes and kinds."""

import io
import sys

import pytest
from rich.console import Console

from pipeline.commands.options import Failures, NotConfirmedError, show_then_ask
from pipeline.text import human_bytes, kind_text
from storage.errors import LabelStoreError, ShardCorruptError
from storage.keys import MassSpec, TopKSpec
from storage.testing import make_spec


class Terminal(io.StringIO):
    """A keyboard on which this is typed."""

    def isatty(self) -> bool:
        return True


def ask(typed: str | None, monkeypatch: pytest.MonkeyPatch, *, yes: bool = False) -> str:
    """What is shown when somebody types this; None is no terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO() if typed is None else Terminal(typed))
    shown = io.StringIO()
    show_then_ask(Console(file=shown), "three files", "Delete them?", yes=yes)
    return shown.getvalue()


@pytest.mark.parametrize("typed", ["y\n", "yes\n", " Y \n"])
def test_after_a_yes_the_command_goes_on(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = ask(typed, monkeypatch)
    assert shown.startswith("three files\n")
    assert "Delete them? [y/N]" in shown


@pytest.mark.parametrize("typed", ["n\n", "\n", "maybe\n", ""])
def test_anything_else_is_a_no(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotConfirmedError, match="nothing was changed"):
        ask(typed, monkeypatch)


def test_who_agreed_beforehand_is_shown_it_and_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(None, monkeypatch, yes=True) == "three files\n"


def test_without_a_terminal_nobody_can_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotConfirmedError, match="add --yes"):
        ask(None, monkeypatch)


def test_failures_are_raised_together_at_the_end() -> None:
    failures = Failures()
    for key in ("a", "b", "c"):
        with failures.noted(key):
            if key != "b":
                raise ShardCorruptError(f"{key} is broken")
    with pytest.raises(LabelStoreError, match=r"2 label sets failed:\n  a: a is .*\n  c: c is "):
        failures.raise_all()


def test_no_failure_is_raised_where_there_is_none() -> None:
    Failures().raise_all()


def test_a_bug_is_no_failure_of_a_set() -> None:
    with pytest.raises(KeyError), Failures().noted("a"):
        raise KeyError("a")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1234567, "1.2 MB"), (2e15, "2000.0 TB")]
)
def test_sizes_have_a_unit(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (TopKSpec(k=64), "top-64"),
        (MassSpec(mass=0.999, cap=64), "99.9 % <= 64"),
        (MassSpec(mass=0.95, cap=8), "95 % <= 8"),
    ],
)
def test_a_kind_is_told_in_a_few_signs(kind: TopKSpec | MassSpec, text: str) -> None:
    assert kind_text(make_spec().model_copy(update={"kind": kind})) == text
