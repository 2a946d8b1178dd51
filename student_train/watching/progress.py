"""How far a training is, for a person who started it without the pipeline."""

import sys
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

RECENT_STEPS = 32
"""Steps whose mean time the estimate is made from."""
LINE_EVERY_S = 10.0
"""Seconds between lines where there is no terminal."""


class Pace:
    """Mean pace of the last steps."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=RECENT_STEPS)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of a step."""
        self._recent.append((metrics["seconds"], metrics["tokens"], metrics["data_wait_s"]))

    def text(self, steps_left: int) -> str:
        """Tokens per second, share of waiting for data, and time left."""
        seconds, tokens, waited = (sum(column) for column in zip(*self._recent, strict=True))
        left = timedelta(seconds=round(steps_left * seconds / len(self._recent)))
        return f"{tokens / seconds:,.0f} tok/s, waits {waited / seconds:.1%}, {left} left"


class StepProgress:
    """A bar in a terminal, else a line every ten seconds and at the end; on stderr.

    Args:
        console: Where to, for tests.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._pace = Pace()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=None, pace="")
            self._bar.start()
        self._next_line_s = time.monotonic() + LINE_EVERY_S

    def show(self, metrics: Mapping[str, float]) -> None:
        """After a step: its line of ``metrics.jsonl``."""
        self._pace.add(metrics)
        step, total = int(metrics["step"]), int(metrics["total_steps"])
        pace = f"loss {metrics['loss']:.4f}, {self._pace.text(total - step)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, total=total, pace=pace)
        elif step == total or time.monotonic() >= self._next_line_s:
            self._console.print(f"step {step} of {total}, {pace}", highlight=False, soft_wrap=True)
            self._next_line_s = time.monotonic() + LINE_EVERY_S

    def say(self, text: str) -> None:
        """One line beside the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
