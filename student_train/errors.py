"""Expected failures of the student stage."""

from storage.errors import DistillError


class StudentError(DistillError):
    """Base class: the student cannot be trained or evaluated as asked."""


class PreflightError(StudentError):
    """Student and labels do not fit each other; found before the first step."""


class NonFiniteLossError(StudentError):
    """A loss became NaN or infinite; nothing is skipped silently."""


class TrainingStoppedError(StudentError):
    """A training was asked to stop, has saved a checkpoint and can go on from it.

    Args:
        step: Finished optimiser steps, all of them in the checkpoint.
        total_steps: Of the whole training.
    """

    def __init__(self, step: int, total_steps: int) -> None:
        super().__init__(step, total_steps)
        self.step, self.total_steps = step, total_steps

    def __str__(self) -> str:
        return (
            f"the training was asked to stop and did so after step {self.step} of "
            f"{self.total_steps}; start it again to go on from there"
        )
