"""Minus the student's log-prob of the hard label: what the fused pass computes anyway."""

from torch import Tensor

from student_train.hard.base import HardRest
from student_train.hard.config import CrossEntropyConfig
from student_train.losses.base import TeacherRows
from student_train.losses.linear_head import LinearHead


class CrossEntropy:
    """Cross-entropy of the hard labels with the given weights."""

    def __init__(
        self, hidden_MH: Tensor, head: LinearHead, rows: TeacherRows, config: CrossEntropyConfig
    ) -> None:
        pass

    def cross_entropy_weight(
        self, place: slice, weight_N: Tensor, student_logprob_N: Tensor
    ) -> Tensor:
        """The weights as they are."""
        return weight_N

    def rest(self, weight_M: Tensor, student_logprob_M: Tensor) -> HardRest:
        """Nothing."""
        return HardRest()
