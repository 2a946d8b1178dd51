"""Values that hard terms exchange. Shape legend: M supervised rows, H hidden size."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from student_train.hard.config import HardTermOptions
from student_train.losses.base import TeacherRows
from student_train.losses.linear_head import LinearHead


@dataclass(frozen=True, slots=True)
class HardTerm:
    """A hard term, split into what the fused pass computes anyway and the rest."""

    cross_entropy_weight_M: Tensor
    """float[M]: weight of the cross-entropy in the fused pass, detached. Negative is possible."""
    rest: Tensor | None = None
    """Scalar with gradient: what has to be added to the fused sum, nats; None for nothing."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """float[M] each: detached values of every row, by the name of their metric."""


class HardTermFunction(Protocol):
    """A function of hidden states and labels to a hard term."""

    def __call__(
        self,
        hidden_MH: Tensor,
        head: LinearHead,
        rows: TeacherRows,
        config: HardTermOptions,
        *,
        weight_M: Tensor,
        student_logprob_M: Tensor | None,
    ) -> HardTerm:
        """The hard term of every row, weighted.

        Args:
            hidden_MH: float[M, H], hidden states of the supervised positions.
            head: Output embedding and what follows it.
            rows: Labels of the same positions.
            config: Options.
            weight_M: float[M], weight of the hard term, detached.
            student_logprob_M: float[M], student's log-prob of the hard label, detached; given
                where the config says ``needs_student``.
        """
