"""What a tracker is, and how several of them are told the same."""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from student_train.errors import PreflightError
from student_train.losses.base import load
from student_train.watching.trackers import TRACKERS


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """The training that metrics belong to."""

    directory: Path
    """Output directory of the training; trackers keep their files and ids in it."""
    name: str
    """What a person calls it, ``project/student`` as a rule."""
    settings: Mapping[str, Any]
    """Settings, as plain values."""
    finished_steps: int
    """Steps that a resumed training does not make again; 0 in a new one."""


class Tracker(Protocol):
    """One service. Made from a :class:`TrackedRun` on rank 0, before the first step.

    After a resume it gets the steps after ``finished_steps``, some of which it may have had before:
    it must not show them twice.
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by their names, after ``step`` finished steps; steps never go back."""

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """Markdown by its name."""

    def close(self) -> None:
        """Send what is left."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing.

    Raises:
        PreflightError: one sentence with a way out.
    """
    for name in names:
        package = TRACKERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise PreflightError(
                f"train.watch.trackers names {name}, but the package {package} is not installed; "
                f"run `pip install {package}` or leave it out"
            )


class Trackers:
    """All trackers of a training; one that fails is dropped with a warning, the training goes on.

    Args:
        names: Which ones.
        run: The training.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            make = cast(Callable[[TrackedRun], Tracker], load(TRACKERS[name][0]))
            self._guarded(name, partial(self._add, name, make, run))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, partial(tracker.scalars, step, values))

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """See :class:`Tracker`."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, partial(tracker.texts, step, values))

    def close(self) -> None:
        """Close all of them."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.close)

    def _add(self, name: str, make: Callable[[TrackedRun], Tracker], run: TrackedRun) -> None:
        self._trackers[name] = make(run)

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - foreign code; a training must not end by it
            self._trackers.pop(name, None)
            sys.stderr.write(
                f"warning: {name} gets no more metrics, the training goes on without it: "
                f"{type(error).__name__}: {error}\n"
            )
