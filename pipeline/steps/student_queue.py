"""Which student is trained by whom: the state of all trainings, without any clock or process.

A *slot* is a group of processes that trains one student after the other. Several slots work side by
side; each takes the next student when it has finished one. A group that died and was started again
goes on with the student that it had.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

StudentState = Literal["waiting", "training", "trained", "failed", "stopped"]
NO_STUDENT = -1
"""What a slot is given when nothing is left for it."""


@dataclass(slots=True)
class StudentTraining:
    """How one student's training is doing."""

    state: StudentState = "waiting"
    why: str = ""
    """The last reason why its processes died, or where it stopped."""
    deaths: int = 0
    """How often its processes died."""
    in_vain: int = 0
    """Deaths since it last got further than ever before."""
    furthest: int = 0
    """Most steps that were seen."""
    furthest_at_death: int = -1


class StudentQueue:
    """Hands students to slots.

    It runs as a Ray actor, so it takes and returns plain values only.

    Args:
        count: How many students there are; they are called 0 to ``count`` - 1.
        restarts: Deaths in a row, none of which got further, that a training survives.
    """

    def __init__(self, count: int, *, restarts: int) -> None:
        self._students = [StudentTraining() for _ in range(count)]
        self._restarts = restarts
        self._current: dict[int, int] = {}
        self._lives: set[int] = set()
        self._deaths_at_start: dict[int, int] = {}
        self._stopping = False

    def take(self, slot: int) -> int:
        """The student that a slot trains next: its unfinished one, or the first that waits."""
        self._lives.add(slot)
        self._deaths_at_start.pop(slot, None)
        if self._stopping:
            number = self._current.pop(slot, None)
            if number is not None:
                self._students[number].state = "stopped"
            return NO_STUDENT
        if slot not in self._current:
            waiting = [n for n, s in enumerate(self._students) if s.state == "waiting"]
            if not waiting:
                return NO_STUDENT
            self._current[slot] = waiting[0]
            self._students[waiting[0]].state = "training"
        return self._current[slot]

    def done(self, slot: int) -> None:
        """The student of a slot is trained."""
        self._students[self._current.pop(slot)].state = "trained"

    def stopped(self, slot: int, where: str) -> None:
        """The student of a slot stopped in good order."""
        student = self._students[self._current.pop(slot)]
        student.state, student.why = "stopped", where

    def died(self, slot: int, why: str, *, final: bool = False) -> None:
        """The processes of a slot died; told twice of one death, it counts once.

        Args:
            slot: Whose.
            why: For people.
            final: The same would happen again.
        """
        number = self._current.get(slot)
        if number is None:
            self._deaths_at_start[slot] = self._deaths_at_start.get(slot, 0) + 1
            return
        if slot not in self._lives:
            return
        self._lives.discard(slot)
        student = self._students[number]
        student.why = why
        student.deaths += 1
        further = student.furthest > student.furthest_at_death
        student.in_vain = 1 if further else student.in_vain + 1
        student.furthest_at_death = student.furthest
        if final or student.in_vain > self._restarts:
            self._fail(slot)

    def gone(self, slot: int, why: str) -> None:
        """A slot has ended for good; what it had, it did not finish."""
        if slot in self._current:
            self._students[self._current[slot]].why = why
            self._fail(slot)

    def reached(self, number: int, steps: int) -> None:
        """So many steps of a student were seen."""
        student = self._students[number]
        student.furthest = max(student.furthest, steps)

    def give_up(self, why: str) -> None:
        """No slot is left: what waits or is in training has failed."""
        for student in self._students:
            if student.state in ("waiting", "training"):
                student.state, student.why = "failed", student.why or why

    def stop(self) -> None:
        """Give out nothing more; trainings that ask are told to stop."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether trainings are asked to stop."""
        return self._stopping

    def students(self) -> list[StudentTraining]:
        """How every training is doing, by number."""
        return list(self._students)

    def broken(self) -> list[int]:
        """Slots whose processes die before they take a student."""
        return [s for s, deaths in self._deaths_at_start.items() if deaths > self._restarts]

    def _fail(self, slot: int) -> None:
        self._students[self._current.pop(slot)].state = "failed"


def unfinished(students: Sequence[StudentTraining]) -> bool:
    """Whether any student waits or is in training."""
    return any(student.state in ("waiting", "training") for student in students)
