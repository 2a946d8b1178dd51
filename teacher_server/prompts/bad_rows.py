"""Rows that cannot be used."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    file: str
    line: int
    problem: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.problem}"


class BadRowError(ValueError):
    """Internal: why one row is unusable. Whoever knows file and line makes a BadRow of it."""
