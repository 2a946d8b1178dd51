"""TAID's interpolation parameter t as a small state machine on the host.

``optimizer_step`` feeds it once per optimiser step with the sum and count of the soft loss over all
ranks, so every rank holds the same t, t never changes inside an accumulation window, and the result
does not depend on how a step is cut. ``local_micro_batch`` does what the authors' release does:
every rank feeds its own controller with its own mean after every micro-batch.

Everything is a Python float, which is float64: kept as a buffer of a bfloat16 module, t would stay
at 0.4 for ever, for its updates are below the spacing of that dtype. JSON keeps the state bit by
bit. Nothing but training calls ``observe``, so evaluation cannot move t.
"""

import math
from typing import Self, TypedDict

from student_train.config import TaidScheduleConfig
from student_train.errors import StudentError

EPSILON = 1e-15
"""Keeps the relative change finite at a loss of 0, as in the authors' release."""


class TaidState(TypedDict):
    """What a checkpoint holds. JSON has no infinity: ``previous_loss`` is None at the start."""

    t: float
    momentum: float
    change: float
    previous_loss: float | None
    num_updates: int


class TaidController:
    r"""Moves t from ``start`` to ``end``, faster while the loss falls.

    With L the mean soft loss that was just measured at the old t:

    .. math::
        \delta &= (L_{prev} - L) / (L_{prev} + \epsilon) \\
        m &\leftarrow \beta m + (1 - \beta) \delta \\
        t &\leftarrow \min(t_{end}, \max(t_{lin}, t + \alpha \, \sigma(m) (1 - t)))

    where t_lin is the straight line from start to end over all steps, taken at the finished steps
    before this one. The first call only remembers L. The mode ``linear`` sets t to t_lin.

    Source: TAID (Shing et al., ICLR 2025), algorithm 1, and the authors' release (``taid.py``).

    Args:
        config: Constants.
        total_steps: Optimiser steps of the training.
    """

    def __init__(self, config: TaidScheduleConfig, total_steps: int) -> None:
        self._config = config
        self._total_steps = total_steps
        self._alpha = config.alpha
        if config.reference_steps is not None:
            self._alpha = min(1.0, config.alpha * config.reference_steps / total_steps)
        self._t = config.start
        self._momentum = 0.0
        self._change = 0.0
        self._previous_loss: float | None = None
        self._num_updates = 0

    @property
    def t(self) -> float:
        """The parameter that the next loss is computed with."""
        return self._t

    @property
    def momentum(self) -> float:
        """M of the last update; 0 before the first, and with the mode ``linear``."""
        return self._momentum

    @property
    def change(self) -> float:
        """Delta of the last update, the relative fall of the loss; 0 before the first."""
        return self._change

    def observe(self, loss_sum: float, count: float, *, step: int) -> None:
        """Take in the soft loss of one optimiser step (or micro-batch) and move t.

        Args:
            loss_sum: Nats, summed over the rows.
            count: Number of these rows; without any nothing is observed.
            step: Finished optimiser steps before this one.

        Raises:
            StudentError: if the loss is not finite.
        """
        if count == 0:
            return
        loss = loss_sum / count
        if not math.isfinite(loss):
            raise StudentError(
                f"the soft loss of step {step + 1} is {loss}; the schedule of TAID cannot go on "
                "from that; lower the learning rate or check the student's weights"
            )
        previous, self._previous_loss = self._previous_loss, loss
        self._num_updates += 1
        if previous is None:
            return
        config = self._config
        linear = config.start + (config.end - config.start) * step / self._total_steps
        if config.mode == "linear":
            self._t = linear
            return
        self._change = (previous - loss) / (previous + EPSILON)
        self._momentum = config.momentum * self._momentum + (1 - config.momentum) * self._change
        step_size = self._alpha * _sigmoid(self._momentum) * (1 - self._t)
        self._t = min(config.end, max(linear, self._t + step_size))

    def state(self) -> TaidState:
        """The state as plain JSON values."""
        return TaidState(
            t=self._t,
            momentum=self._momentum,
            change=self._change,
            previous_loss=self._previous_loss,
            num_updates=self._num_updates,
        )

    def restore(self, state: TaidState) -> Self:
        """Go on from a state; returns the controller."""
        self._t = state["t"]
        self._momentum = state["momentum"]
        self._change = state["change"]
        self._previous_loss = state["previous_loss"]
        self._num_updates = state["num_updates"]
        return self


def _sigmoid(value: float) -> float:
    """Without overflow on either side."""
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) / (1.0 + math.exp(value))
