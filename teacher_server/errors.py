"""Expected failures of the teacher stage."""

from storage.errors import DistillError


class TeacherError(DistillError):
    """Base class: the teacher cannot label as asked."""


class CaptureError(TeacherError):
    """The engine's labels failed the start-up self-test."""
