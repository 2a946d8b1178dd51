"""Arguments that several commands share, and how they print."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from storage.errors import DistillError, LabelStoreError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from pipeline.project import Project
    from storage.store import LabelStore

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file of the project.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as train.epochs=2."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", metavar="URI", help="Label store: a path, s3://, gs:// or az://."),
]
RunsOption = Annotated[
    Path, typer.Option("--runs", metavar="DIR", help="Directory of run folders.")
]
KeyArgument = Annotated[
    str,
    typer.Argument(
        metavar="KEY", help="Label set key, or a unique beginning of it.", show_default=False
    ),
]
KeyOrAllArgument = Annotated[
    str | None,
    typer.Argument(metavar="[KEY]", help="Label set key (or its beginning); all sets by default."),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]
DEFAULT_RUNS = Path("runs")
DEFAULT_STORE = "labels"
SHOWN_KEY_DIGITS = 12
"""Enough to tell keys apart; every command takes any unique beginning."""


def open_project(config: Path, overrides: list[str] | None, *, as_json: bool) -> "Project":
    """Load a configuration; with ``--json``, progress goes to stderr.

    Raises:
        ConfigError: if it is wrong, or a job would lose what it makes.
    """
    from pipeline.config import load_config
    from pipeline.project import Project
    from pipeline.submit import require_lasting_paths, runs_as_job

    loaded = load_config(config, overrides or ())
    if runs_as_job():
        require_lasting_paths(loaded)
    return Project(loaded, console(as_json=as_json))


def open_store(uri: str | None) -> "LabelStore":
    """The store that a command is about.

    Raises:
        LabelStoreError: if there is none.
    """
    from storage.store import LabelStore

    store = LabelStore(uri or DEFAULT_STORE)
    if not store.objects.exists:
        raise LabelStoreError(f"store {store.uri!r} does not exist; name one with --store")
    return store


class NotConfirmedError(DistillError):
    """Nobody agreed to what a command was about to do; nothing was changed."""


def show_then_ask(out: "Console", shown: "RenderableType", question: str, *, yes: bool) -> None:
    """Show what is about to happen, and go on only if the user agrees.

    Args:
        out: Where the user reads.
        shown: What would happen.
        question: To be answered with yes or no.
        yes: The user has agreed beforehand.

    Raises:
        NotConfirmedError: if the user does not agree, or cannot be asked.
    """
    out.print(shown)
    if yes:
        return
    if not sys.stdin.isatty():
        raise NotConfirmedError("there is no terminal to ask; add --yes to go on without asking")
    try:
        answer = out.input(f"{question} [y/N] ", markup=False)
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise NotConfirmedError("not confirmed; nothing was changed")


class Failures:
    """Label sets that failed while the others went on."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    @contextmanager
    def noted(self, key: str) -> Iterator[None]:
        """Go on behind the block if the store refuses something in it."""
        try:
            yield
        except LabelStoreError as error:
            self._texts.append(f"{key}: {error}")

    def raise_all(self) -> None:
        """End the command.

        Raises:
            LabelStoreError: listing all failures, if there are any.
        """
        if self._texts:
            listed = "\n  ".join(self._texts)
            raise LabelStoreError(f"{len(self._texts)} label sets failed:\n  {listed}")


def console(*, as_json: bool) -> "Console":
    """Where people read.

    With ``--json``, stdout belongs to the document: everything else that this process prints,
    messages of libraries included, goes to stderr.
    """
    from rich.console import Console

    if as_json and sys.stdout is not sys.stderr:
        _data_stream.append(sys.stdout)
        sys.stdout = sys.stderr
    return Console(stderr=as_json)


_data_stream: list[TextIO] = []
"""The real stdout, while it is reserved for the document."""


def print_json(value: Any) -> None:
    """One JSON document on stdout, which is given back."""
    if _data_stream:
        sys.stdout = _data_stream.pop()
    sys.stdout.write(json.dumps(value, indent=1) + "\n")
