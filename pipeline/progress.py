"""Progress of long work: bars in a terminal, a line now and then in a log."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_EVERY_S = 15.0


class Bars:
    """Named progress bars; a context manager.

    Args:
        console: Where they are shown. Without a terminal, a line is printed for what moved, at
            most every LOG_EVERY_S.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
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
        if name not in self._tasks:
            self._bars.start()  # not before: a spinner may be showing until here
            self._tasks[name] = self._bars.add_task(name, total=total, note=note)
        self._bars.update(self._tasks[name], completed=completed, total=total, note=note)
        if not self._console.is_terminal:
            self._log(name, completed, total, note)

    def _log(self, name: str, completed: int, total: int | None, note: str) -> None:
        last_time, last_completed = self._logged.get(name, (0.0, -1))
        finished = total is not None and completed >= total
        due = time.monotonic() - last_time >= LOG_EVERY_S
        if completed != last_completed and (due or finished):
            self._logged[name] = (time.monotonic(), completed)
            self._console.print(f"{name}: {completed}/{total or '?'} {note}", highlight=False)
