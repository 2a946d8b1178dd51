"""Values that weight policies exchange. Shape legend: M supervised rows, K stored tokens."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from student_train.losses.base import TeacherRows
from student_train.schedules import StepState
from student_train.weights.config import WeightPolicyConfig


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Weights of the two terms of every row, detached, in [0, 1]."""

    soft_M: Tensor
    """float[M]: weight of the divergence."""
    hard_M: Tensor
    """float[M]: weight of the hard term."""

    @classmethod
    def blend(cls, soft_M: Tensor) -> "TokenWeights":
        """Weights that sum to one: the hard term gets what the soft term leaves."""
        return cls(soft_M, 1.0 - soft_M)


@dataclass(frozen=True, slots=True)
class WeightContext:
    """What a policy may know beyond the labels."""

    vocab_size: int
    """Effective vocabulary of the labels."""
    step: StepState
    """Where the training stands."""
    teacher_logprob_M: Tensor | None = None
    """float[M]: teacher's log-prob of the hard label; None where it is not stored."""
    student_logprob_M: Tensor | None = None
    """float[M]: student's, detached; the fused pass knows it before it needs the weights."""


class WeightPolicy(Protocol):
    """A function of labels and context to weights, row by row.

    It is called in the fused pass, for some rows of a micro-batch at a time.
    """

    def __call__(
        self, rows: TeacherRows, config: WeightPolicyConfig, context: WeightContext
    ) -> TokenWeights:
        """Weights of every row; gradients never flow through them."""
