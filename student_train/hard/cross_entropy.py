"""Minus the student's log-prob of the hard label: what the fused pass computes anyway."""

from torch import Tensor

from student_train.hard.base import HardTerm
from student_train.hard.config import CrossEntropyConfig
from student_train.losses.base import TeacherRows
from student_train.losses.linear_head import LinearHead


def cross_entropy(
    hidden_MH: Tensor,
    head: LinearHead,
    rows: TeacherRows,
    config: CrossEntropyConfig,
    *,
    weight_M: Tensor,
    student_logprob_M: Tensor | None,
) -> HardTerm:
    """Cross-entropy of the hard labels with the given weights."""
    return HardTerm(weight_M)
