"""Keys of the interactive view of samples in a terminal."""

import os
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rich.console import Console
from rich.text import Text

from pipeline.inspection.measures import MEASURES
from pipeline.inspection.record import InspectedSample
from pipeline.inspection.terminal import sample_view
from storage.errors import DistillError

HELP = (
    "n/p next/previous sample   left/right position   b colour by   / search   "
    "x next difference   q quit"
)

ARROWS = {b"[C": "right", b"[D": "left", b"[A": "up", b"[B": "down"}
"""What follows an escape byte."""


@dataclass(frozen=True, slots=True)
class View:
    """What is on the screen."""

    sample: int = 0
    """Which of the samples."""
    row: int | None = None
    """Which labelled position has its candidates shown, None for none."""
    measure: str = "entropy"
    note: str = ""


class Browser:
    """Shows one sample after another and answers keys.

    Args:
        keys: Samples, in order.
        read: Reads one.
        out: Where to show it.
        measure: What to colour by at first.
        top: Candidates in a table.
        ask: Asks the user for a line of text.
        position: Position of the first sample whose candidates are shown at first.
    """

    def __init__(
        self,
        keys: Sequence[str],
        read: Callable[[str], InspectedSample],
        out: Console,
        *,
        measure: str,
        top: int,
        ask: Callable[[str], str],
        position: int | None = None,
    ) -> None:
        self._keys, self._read, self._out, self._top, self._ask = keys, read, out, top, ask
        self._wanted = ""
        self.view = View(measure=measure)
        self._load()
        if position is not None:
            self.view = replace(self.view, row=self.current.row_of(position))

    def _load(self) -> None:
        self.current = self._read(self._keys[self.view.sample])

    def show(self) -> None:
        """Draw the screen."""
        view = self.view
        place = None if view.row is None else int(self.current.sample.positions_N[view.row])
        self._out.clear()
        self._out.print(Text(f"sample {view.sample + 1} of {len(self._keys)}", style="dim"))
        self._out.print(sample_view(self.current, view.measure, position=place, top=self._top))
        self._out.print(Text(HELP, style="dim"))
        if view.note:
            self._out.print(Text(view.note, style="bold"))

    def press(self, key: str) -> bool:
        """Answer a key; whether to go on."""
        self.view = replace(self.view, note="")
        match key:
            case "q":
                return False
            case "n" | "p":
                self._move_sample(1 if key == "n" else -1)
            case "right" | "left" | "up" | "down":
                self._move_position({"right": 1, "left": -1, "down": 10, "up": -10}[key])
            case "b":
                self._next_measure()
            case "x":
                self._next_difference()
            case "/":
                self._search()
        return True

    def _move_sample(self, step: int) -> None:
        place = self.view.sample + step
        if not 0 <= place < len(self._keys):
            self.view = replace(self.view, note="no more samples in this direction")
            return
        self.view = replace(self.view, sample=place, row=None)
        self._load()

    def _move_position(self, step: int) -> None:
        row = 0 if self.view.row is None else self.view.row + step
        last = len(self.current.sample.positions_N) - 1
        self.view = replace(self.view, row=max(0, min(last, row)))

    def _next_measure(self) -> None:
        found = self.current.predictions
        known = [name for name in MEASURES if any(name in model.values for model in found)]
        place = known.index(self.view.measure) if self.view.measure in known else -1
        self.view = replace(self.view, measure=known[(place + 1) % len(known)])

    def _next_difference(self) -> None:
        row = -1 if self.view.row is None else self.view.row
        rows = self.current.disagrees_N.nonzero()[0].tolist()
        if not rows:
            self.view = replace(self.view, note="the likeliest tokens never differ")
            return
        self.view = replace(self.view, row=next((n for n in rows if n > row), rows[0]))

    def _search(self) -> None:
        """Find text in this response, behind the position that is shown."""
        self._wanted = self._ask("search: ") or self._wanted
        row = -1 if self.view.row is None else self.view.row
        found = find_rows(self.current, self._wanted) if self._wanted else []
        if not found:
            self.view = replace(self.view, note=f"{self._wanted!r} does not occur")
            return
        self.view = replace(self.view, row=next((n for n in found if n > row), found[0]))


def find_rows(inspected: InspectedSample, wanted: str) -> list[int]:
    """Rows of the labelled tokens at which a text starts, whatever its case."""
    rows = {place: row for row, place in enumerate(inspected.sample.positions_N.tolist())}
    text, owners = "", []
    for place, piece in enumerate(inspected.response):
        added = piece.text if piece.joined is None else piece.joined
        if piece.first == place:
            text += added.casefold()
            owners += [place] * len(added.casefold())
    found, start = [], text.find(wanted.casefold())
    while start >= 0:
        if owners[start] in rows:
            found.append(rows[owners[start]])
        start = text.find(wanted.casefold(), start + 1)
    return found


# -- the terminal ----------------------------------------------------------------------------------
def browse(browser: Browser) -> None:
    """Answer keys of the terminal until the user quits."""
    descriptor = sys.stdin.fileno()
    with _single_keys(descriptor):
        while True:
            browser.show()
            key = read_key(descriptor)
            try:
                if not browser.press(key):
                    return
            except DistillError as error:  # the sample cannot be shown; the others can
                browser.view = replace(browser.view, note=f"error: {error}")


def read_key(descriptor: int) -> str:
    """The next key: a character, or the name of an arrow; the end of input quits."""
    first = os.read(descriptor, 1)
    if first in (b"", b"\x03", b"\x04"):
        return "q"
    if first == b"\x1b":
        return ARROWS.get(os.read(descriptor, 2), "")
    return first.decode("ascii", "replace")


def ask_line(question: str) -> str:
    """A line of text, typed with the terminal in its ordinary state."""
    descriptor = sys.stdin.fileno()
    raw = termios.tcgetattr(descriptor)
    line_mode = list(raw)
    line_mode[3] |= termios.ICANON | termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSADRAIN, line_mode)
    try:
        sys.stdout.write(question)
        sys.stdout.flush()
        return sys.stdin.readline().rstrip("\n")
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, raw)


@contextmanager
def _single_keys(descriptor: int) -> Iterator[None]:
    """Keys arrive at once and are not echoed; the terminal is left as it was found."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor, termios.TCSADRAIN)  # keys typed before count
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
