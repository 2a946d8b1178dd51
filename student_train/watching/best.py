"""The best student so far as an exported directory, which a crash never loses.

It is exported when it is found, at any ZeRO stage, so nothing has to be loaded back at the end.
What was best at the last checkpoint stays until the next one: a resumed training may come to
another.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from storage.files import write_atomically
from student_train.config import (
    ADAPTER_DIRECTORY,
    MODEL_DIRECTORY,
    SELECTION_FILE,
    TrainJob,
)
from student_train.engine import gather_over_ranks
from student_train.errors import StudentError

BEST_DIRECTORY = "best"
"""Folder of the exported candidates, in the output directory."""
Export = Callable[[TrainJob, Mapping[str, str], Mapping[str, float]], None]
"""Exports the student as it is now; of a job, facts for the model card, held-out metrics."""


class BestStudent:
    """The candidates of one training. Call every method on every rank, with equal arguments.

    Args:
        job: The training.
        export: Writes a student into the output directory of a job.
        writes: Whether this rank writes.
        finished_steps: Steps that the loaded checkpoint contains; later candidates are dropped.
    """

    def __init__(self, job: TrainJob, export: Export, *, writes: bool, finished_steps: int) -> None:
        self._job, self._export, self._writes = job, export, writes
        self._directory = Path(job.output) / BEST_DIRECTORY
        self._at_checkpoint: int | None = None
        self._current: int | None = None
        self._drop(lambda step: step > finished_steps)

    def restore(self, step: int | None) -> bool:
        """Go on from the best step of what the loaded checkpoint contains.

        Returns:
            False where that student is gone, because the training goes on from a checkpoint before
            the last; the best one is then sought among those to come.
        """
        there = step is not None and (self._place(step) / MODEL_DIRECTORY).is_dir()
        if not gather_over_ranks(there)[0]:
            return False
        self._at_checkpoint = self._current = step
        return True

    def keep(self, step: int, facts: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """Export the student of now as the best one."""
        job = self._job.model_copy(update={"output": str(self._place(step))})
        self._export(job, facts, metrics)
        self._current = step
        self._drop(lambda other: other not in (step, self._at_checkpoint))

    def checkpointed(self) -> None:
        """A checkpoint was saved: what was best at the one before is not needed any more."""
        self._at_checkpoint = self._current
        self._drop(lambda other: other != self._current)

    def publish(self) -> None:
        """Move the best student to where the exported one is expected.

        Raises:
            StudentError: if somebody removed it.
        """
        if not self._writes or self._current is None:
            return
        place, output = self._place(self._current), Path(self._job.output)
        if not (place / MODEL_DIRECTORY).is_dir():
            raise StudentError(
                f"the best student, of step {self._current}, is not in {place} any more; remove "
                f"{output} to train again"
            )
        for name in (ADAPTER_DIRECTORY, MODEL_DIRECTORY):  # with the model the student is there
            if (place / name).is_dir():
                (place / name).rename(output / name)
        shutil.rmtree(self._directory)

    def _place(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}"

    def _drop(self, which: Callable[[int], bool]) -> None:
        """Remove the candidates of some steps."""
        if self._writes:
            for place in self._directory.glob("step-*"):
                if which(int(place.name.removeprefix("step-"))):
                    shutil.rmtree(place)


def write_selection(output: Path, selection: Mapping[str, object]) -> None:
    """Write ``selection.json``: which step was exported, by what, and what to know about it."""
    write_atomically(output / SELECTION_FILE, json.dumps(selection, indent=1).encode())
