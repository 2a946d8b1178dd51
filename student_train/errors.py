"""Expected failures of the student stage."""

from storage.errors import DistillError


class StudentError(DistillError):
    """Base class: the student cannot be trained or evaluated as asked."""


class PreflightError(StudentError):
    """Student and labels do not fit each other; found before the first step."""


class NonFiniteLossError(StudentError):
    """A loss became NaN or infinite; nothing is skipped silently."""
