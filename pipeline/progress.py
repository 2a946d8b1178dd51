"""Progress of long work: bars in a terminal, a line now and then in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.text import human_bytes

LOG_EVERY_S = 15.0


class Bars:
    """Named progress bars; a context manager.

    Args:
        console: Where they are shown. Without a terminal, a line is printed for what moved, at
            most every LOG_EVERY_S.
        text: How a count is written.
        tell: Also told of every change: name, completed, total and note.
    """

    def __init__(
        self,
        console: Console,
        *,
        text: Callable[[int], str] = str,
        tell: Callable[[str, int, int | None, str], None] | None = None,
    ) -> None:
        self._console, self._text, self._tell = console, text, tell
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._logged: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> "Bars":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def show(self, name: str, completed: int, total: int | None, note: str = "") -> None:
        """Set a bar; it appears with its first value."""
        count = f"{self._text(completed)}/{'?' if total is None else self._text(total)}"
        if name not in self._tasks:
            self._bars.start()  # not before: a spinner may be showing until here
            self._tasks[name] = self._bars.add_task(name, total=total, count=count, note=note)
        self._bars.update(
            self._tasks[name], completed=completed, total=total, count=count, note=note
        )
        if self._tell is not None:
            self._tell(name, completed, total, note)
        if not self._console.is_terminal:
            finished = total is not None and completed >= total
            self._log(name, completed, f"{name}: {count} {note}", finished=finished)

    def _log(self, name: str, completed: int, line: str, *, finished: bool) -> None:
        last_time, last_completed = self._logged.get(name, (0.0, -1))
        due = time.monotonic() - last_time >= LOG_EVERY_S
        if completed != last_completed and (due or finished):
            self._logged[name] = (time.monotonic(), completed)
            self._console.print(line.rstrip(), highlight=False)


@contextmanager
def byte_bar(console: Console, name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar of bytes; the block calls what it is given with the bytes that were done."""
    done = 0
    with Bars(console, text=human_bytes) as bars:

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            bars.show(name, done, total)

        yield advance
