"""What moves during a training: the step, and the t of TAID."""

from typing import Any

from student_train.config import SupervisionConfig
from student_train.engine import gather_over_ranks, world
from student_train.errors import StudentError
from student_train.schedules import StepState
from student_train.taid_controller import TaidController


class StepClock:
    """Says where the training stands, and learns from its losses.

    Only the trainer holds one: evaluation cannot move it.

    Args:
        loss: The objective.
        total_steps: Optimiser steps of the whole training.
    """

    def __init__(self, loss: SupervisionConfig, total_steps: int) -> None:
        schedule = loss.taid_schedule
        self._total_steps = total_steps
        self._taid = None if schedule is None else TaidController(schedule, total_steps)
        self._local = schedule is not None and schedule.updates == "local_micro_batch"

    def now(self, step: int) -> StepState:
        """The state after ``step`` finished optimiser steps."""
        t = None if self._taid is None else self._taid.t
        return StepState(step, self._total_steps, t)

    def measures(self) -> dict[str, float]:
        """What t is now, and what moved it there; empty for losses without one."""
        if self._taid is None:
            return {}
        return {
            "t": self._taid.t,
            "t_momentum": self._taid.momentum,
            "t_change": self._taid.change,
        }

    def after_micro_batch(self, soft_sum: float, num_rows: int, *, step: int) -> None:
        """This rank's soft loss of one micro-batch: nats, and the rows that were summed."""
        if self._taid is not None and self._local:
            self._taid.observe(soft_sum, num_rows, step=step)

    def after_step(self, soft_sum: float, num_rows: int, *, step: int) -> None:
        """The soft loss of the whole optimiser step, summed over micro-batches and ranks."""
        if self._taid is not None and not self._local:
            self._taid.observe(soft_sum, num_rows, step=step)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; call on every rank. JSON keeps it bit by bit."""
        return {} if self._taid is None else {"taid": gather_over_ranks(self._taid.state())}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned.

        Raises:
            StudentError: if every rank had a state of its own and their number has changed.
        """
        if self._taid is None:
            return
        states, (rank, world_size) = state["taid"], world()
        if not self._local:
            self._taid.restore(states[0])  # equal on all ranks
        elif len(states) == world_size:
            self._taid.restore(states[rank])
        else:
            raise StudentError(
                f"loss.schedule.updates: local_micro_batch gives every rank a t of its own; the "
                f"checkpoint has those of {len(states)} ranks, and now there are {world_size}; "
                "go on with the old number"
            )
