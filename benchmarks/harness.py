"""What every benchmark shares: flags, timing, the table and the page it leaves.

A benchmark is a script ``benchmarks/NAME.py`` that imports this module first, before numpy, and
hands its goals to :func:`report`::

    import harness

    # isort: split
    import numpy as np

    arguments = harness.argument_parser(__doc__).parse_args()
    times = harness.interleaved({"ours": ours, "theirs": theirs})
    speed = times.ratio("theirs", "ours")
    goals = [harness.Goal("speed", ">= 2x", speed.text("x"), speed.median >= 2, "theirs 1.0")]
    sys.exit(harness.report(goals))

``--quick`` takes at most 3 minutes on two cores; a goal that needs longer is ``FULL_ONLY`` there.
What the machine cannot measure at all is ``NOT_MEASURED``. The exit code is 0 when every goal that
was measured holds, 1 when one does not.

Importing this module limits numerical libraries to one thread, and puts the repository in front of
the import path: a script may be called like a package of ours (``storage.py``).
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["OMP_THREAD_LIMIT"] = "1"
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "benchmarks")]

# isort: split
from rich.console import Console  # noqa: E402 - after the threads are limited
from rich.table import Table  # noqa: E402

from storage.provenance import git_revision, versions  # noqa: E402

FULL_ONLY = "full only"
"""Measured figure of a goal that ``--quick`` leaves out."""

NOT_MEASURED = "not measured here"
"""Measured figure of a goal that this machine, or this input, cannot answer."""

HEADINGS = ("what", "goal", "measured", "holds", "compared with")
MIN_ROUNDS = 5
VERSIONED_PACKAGES = ("duckdb", "numpy", "obstore", "polars", "xxhash", "zstandard")


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the table."""

    name: str
    goal: str
    """What is promised, such as ``>= 18x``; empty for a figure without a promise."""
    measured: str
    """The figure with its unit and spread, or FULL_ONLY or NOT_MEASURED."""
    ok: bool | None
    """Whether the goal holds; None where nothing was promised or measured."""
    contender: str = ""
    """What it was compared with."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A median with its spread over rounds."""

    median: float
    low: float
    high: float

    def text(self, unit: str, *, digits: int = 2) -> str:
        """Such as ``2.10x (2.05-2.20)``."""
        return f"{self.median:.{digits}f}{unit} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass(frozen=True, slots=True)
class Times:
    """CPU seconds of several functions, round by round."""

    seconds: Mapping[str, Sequence[float]]

    def of(self, name: str) -> Figure:
        """CPU seconds of one function."""
        return _figure(self.seconds[name])

    def rate(self, name: str, amount: float) -> Figure:
        """``amount`` per CPU second."""
        return _figure([amount / seconds for seconds in self.seconds[name]])

    def ratio(self, numerator: str, denominator: str) -> Figure:
        """Ratio of two functions; each round is compared with itself, so drift cancels."""
        pairs = zip(self.seconds[numerator], self.seconds[denominator], strict=True)
        return _figure([one / other for one, other in pairs])


def _figure(values: Sequence[float]) -> Figure:
    return Figure(statistics.median(values), min(values), max(values))


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = MIN_ROUNDS
) -> Times:
    """Time functions in turn, round after round, after one warm-up round.

    Args:
        functions: Name and function; what it returns is dropped.
        rounds: At least ``MIN_ROUNDS``; odd, so that the median is a measured round.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds must be at least {MIN_ROUNDS}, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if number > 0:
                seconds[name].append(time.process_time() - start)
    return Times(seconds)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Flags that every benchmark has; a script may add its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="at most 3 minutes on two cores")
    return parser


def report(goals: Sequence[Goal], *, notes: Sequence[str] = ()) -> int:
    """Print the table, write it beside the script and return the exit code.

    Args:
        goals: The lines, in order.
        notes: What a reader must know about the input and the contenders.
    """
    script = Path(sys.argv[0])
    table = Table(title=f"{script.stem} {' '.join(sys.argv[1:])}".strip())
    for heading in HEADINGS:
        table.add_column(heading)
    for goal in goals:
        table.add_row(*_cells(goal))
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    script.with_suffix(".md").write_text(_page(script, goals, notes))
    return 1 if any(goal.ok is False for goal in goals) else 0


def _cells(goal: Goal) -> tuple[str, ...]:
    verdict = {True: "yes", False: "NO", None: ""}[goal.ok]
    return (goal.name, goal.goal, goal.measured, verdict, goal.contender)


def _page(script: Path, goals: Sequence[Goal], notes: Sequence[str]) -> str:
    found = versions() | {name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES}
    installed = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
    flags = [Path(flag).name if Path(flag).is_absolute() else flag for flag in sys.argv[1:]]
    lines = [
        f"# {script.stem}",
        "",
        f"* command: `{' '.join(['python', f'benchmarks/{script.name}', *flags])}`",
        f"* commit: {git_revision()}",
        f"* machine: {_cpu_model()}, {os.cpu_count()} cores",
        f"* date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        f"* versions: Python {platform.python_version()}, {installed}",
        "",
        "Timings are CPU seconds of one thread; figures with brackets are medians of rounds that",
        "take turns after a warm-up, with the lowest and the highest round.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "|---" * len(HEADINGS) + "|",
        *(f"| {' | '.join(_cells(goal))} |" for goal in goals),
        "",
        *(f"* {note}" for note in notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
