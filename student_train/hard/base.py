"""Values that hard terms exchange. Shape legend: M supervised rows, H hidden size."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from student_train.hard.config import HardTermOptions
from student_train.losses.base import TeacherRows
from student_train.losses.linear_head import LinearHead


@dataclass(frozen=True, slots=True)
class HardRest:
    """What a hard term is beside a weighted cross-entropy."""

    total: Tensor | None = None
    """Scalar with gradient: what has to be added to the fused sum, nats; None for nothing."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """float[M] each: detached values of every row, by the name of their metric."""


class HardTerm(Protocol):
    """The hard term of one micro-batch, split into what the fused pass computes and the rest."""

    def cross_entropy_weight(
        self, place: slice, weight_N: Tensor, student_logprob_N: Tensor
    ) -> Tensor:
        """Weight of the cross-entropy of N rows in the fused pass, [N]; negative is possible.

        Called in the pass, once for every part of the micro-batch, from its first row to its last.

        Args:
            place: Where the rows are in the micro-batch.
            weight_N: float[N], weight of the hard term, detached.
            student_logprob_N: float[N], the student's log-prob of the hard labels, detached.
        """

    def rest(self, weight_M: Tensor, student_logprob_M: Tensor) -> HardRest:
        """What has to be added after the pass; arguments as before, of all rows."""


class HardTermFunction(Protocol):
    """Makes the hard term of a micro-batch."""

    def __call__(
        self, hidden_MH: Tensor, head: LinearHead, rows: TeacherRows, config: HardTermOptions
    ) -> HardTerm:
        """The hard term before the fused pass.

        Args:
            hidden_MH: float[M, H], hidden states of the supervised positions.
            head: Output embedding and what follows it.
            rows: Labels of the same positions.
            config: Options.
        """
