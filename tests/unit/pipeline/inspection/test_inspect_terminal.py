"""Samples in a terminal: what is printed, what keys do, and that the terminal is left in order."""

import io
import os
import pty
import termios
from collections.abc import Callable
from itertools import groupby

import pytest
from rich.console import Console

from pipeline.inspection.browse import Browser, find_rows, read_key
from pipeline.inspection.palette import LIGHT
from pipeline.inspection.record import InspectedSample
from pipeline.inspection.source import Inspector
from pipeline.inspection.terminal import HEAT, response_text, sample_view
from pipeline.inspection.testing import TEXTS
from storage.errors import ConfigError

Read = Callable[[str], InspectedSample]


def printed(inspected: InspectedSample, measure: str = "entropy", **options: int) -> str:
    out = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="truecolor")
    out.print(sample_view(inspected, measure, **options))
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


@pytest.mark.parametrize("name", TEXTS)
def test_a_token_has_the_colour_of_its_value(inspected: Read, name: str) -> None:
    found = inspected(name)
    text = response_text(found, found.predictions[0], "surprise")
    values = found.predictions[0].values["surprise"]
    strongest: dict[int, float] = {}
    for piece, value in zip(found.response, values, strict=True):
        strongest[piece.first] = max(strongest.get(piece.first, 0.0), float(value))
    edges = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
    expected = [LIGHT.heat[sum(v >= e for e in edges)] for _, v in sorted(strongest.items())]
    backgrounds: list[str] = []
    for span in text.spans:
        colour = span.style.bgcolor if not isinstance(span.style, str) else None
        assert colour is not None
        backgrounds.append(colour.name)
    # a token may be several spans
    assert [colour for colour, _ in groupby(backgrounds)] == [c for c, _ in groupby(expected)]


@pytest.mark.parametrize("name", TEXTS)
def test_labels_cannot_act_on_the_terminal(inspected: Read, name: str) -> None:
    out = Console(file=io.StringIO(), width=200, color_system=None)
    out.print(sample_view(inspected(name), "entropy", position=3))
    assert isinstance(out.file, io.StringIO)
    text = out.file.getvalue()
    assert not [c for c in text if ord(c) < 32 and c != "\n"]
    assert "\u202e" not in text
    assert "\ufffd" not in text


def test_a_character_of_several_tokens_is_printed_once(inspected: Read) -> None:
    text = response_text(inspected("emoji"), inspected("emoji").predictions[0], "entropy").plain
    assert text.count("\U0001f600") == 1
    assert "\u6f22\u5b57" in text


def test_the_table_of_a_position(inspected: Read) -> None:
    found = inspected("plain")
    shown = printed(found, position=0, top=3)
    row = found.sample.topk_ids_NK[0]
    assert "position 0, sampled 'hello'" in shown
    assert "<- sampled" in shown
    assert all(f" {token}" in shown for token in row[:3].tolist())
    assert "AND position = 0" in shown
    with pytest.raises(ConfigError, match="position 999"):
        printed(found, position=999)


def test_markup_of_rich_in_labels_stays_text(inspected: Read) -> None:
    text = response_text(inspected("hostile"), inspected("hostile").predictions[0], "rank")
    assert "<RLO>\u241b[31m&lt;" in text.plain


def test_the_legend_names_all_colours(inspected: Read) -> None:
    shown = printed(inspected("plain"), "rank")
    assert "below 2" in shown
    assert "200 and more" in shown
    assert len(HEAT) == 7


# -- keys -----------------------------------------------------------------------------------------
@pytest.fixture
def browser(inspector: Inspector, keys: dict[str, str]) -> Browser:
    return Browser(
        list(keys.values()),
        lambda key: next(inspector.read([key])),
        Console(file=io.StringIO(), width=100),
        measure="entropy",
        top=3,
        ask=lambda question: "WORLD",
    )


def press(browser: Browser, *keys: str) -> Browser:
    assert all(browser.press(key) for key in keys)
    browser.show()
    return browser


def test_next_and_previous_sample(browser: Browser, keys: dict[str, str]) -> None:
    order = list(keys.values())
    assert press(browser, "n", "n", "p").current.key == order[1]
    assert press(browser, "p", "p").current.key == order[0]
    assert browser.view.note == "no more samples in this direction"


def test_arrows_move_the_position_and_stop_at_the_ends(browser: Browser) -> None:
    last = len(browser.current.sample.positions_N) - 1
    assert press(browser, "right").view.row == 0
    assert press(browser, "right", "right", "left").view.row == 1
    assert press(browser, "down", *["down"] * 9).view.row == last
    assert press(browser, *["up"] * 9).view.row == 0
    assert press(browser, "n").view.row is None


def test_measures_take_turns(browser: Browser) -> None:
    seen = []
    for _ in range(5):
        seen.append(press(browser, "b").view.measure)
    assert seen == ["tail", "surprise", "rank", "bridge", "entropy"]


def test_search_goes_on_and_begins_anew(browser: Browser) -> None:
    rows = find_rows(browser.current, "world")
    assert len(rows) == 2
    seen = [press(browser, "/").view.row for _ in range(3)]
    assert seen == [rows[0], rows[1], rows[0]]
    assert find_rows(browser.current, "nowhere") == []


def test_one_model_alone_never_differs(browser: Browser) -> None:
    assert "never differ" in press(browser, "x").view.note


def test_q_ends(browser: Browser) -> None:
    assert not browser.press("q")
    assert browser.press("z")


@pytest.mark.parametrize(
    ("sent", "key"), [(b"n", "n"), (b"\x1b[C", "right"), (b"\x1b[A", "up"), (b"\x03", "q")]
)
def test_keys_are_read_from_a_descriptor(sent: bytes, key: str) -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, sent)
        assert read_key(reading) == key
    finally:
        os.close(reading)
        os.close(writing)


def test_the_end_of_input_quits() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    try:
        assert read_key(reading) == "q"
    finally:
        os.close(reading)


def test_a_terminal_is_left_as_it_was(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.inspection import browse as module

    master, slave = pty.openpty()
    try:
        with os.fdopen(slave, "r", closefd=False) as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            before = termios.tcgetattr(slave)
            keys = iter([b"n", b"q"])
            monkeypatch.setattr(browser, "show", lambda: os.write(master, next(keys)))
            module.browse(browser)
            assert termios.tcgetattr(slave) == before
            assert browser.view.sample == 1
    finally:
        os.close(master)
        os.close(slave)
