"""Weighted soft labels: soft labels where the student is behind the teacher on the hard label."""

import torch

from student_train.losses.base import TeacherRows
from student_train.weights.base import TokenWeights, WeightContext
from student_train.weights.config import WslWeightConfig

MAX_RATIO = 10.0
"""Largest ratio of the two losses, as in the authors' release."""


def wsl_weight(rows: TeacherRows, config: WslWeightConfig, context: WeightContext) -> TokenWeights:
    r"""Grows with the student's loss on the hard label, measured in that of the teacher.

    .. math:: r = \min(\log q(y) / \log p(y), 10), \quad w = \lambda (1 - e^{-r}), \quad
        w_{reverse} = \lambda e^{-r}

    Detached; the hard term keeps the weight 1. A teacher that is certain of the label makes r as
    large as it gets, unless the student is certain too: then both losses are 0, and so is r.

    Source: Zhou et al., Rethinking Soft Labels for Knowledge Distillation (ICLR 2021), as in the
    Bridge-Garden release (``wsl``, ``reverse_wsl``).
    """
    assert context.teacher_logprob_M is not None  # refused when the config is read
    assert context.student_logprob_M is not None
    teacher_M = -context.teacher_logprob_M.clamp_max(0.0)
    student_M = -context.student_logprob_M.to(teacher_M).clamp_max(0.0)
    smallest = torch.finfo(teacher_M.dtype).tiny
    ratio_M = (student_M / teacher_M.clamp_min(smallest)).clamp_max(MAX_RATIO)
    soft_M = torch.exp(-ratio_M) if config.reverse else -torch.expm1(-ratio_M)
    return TokenWeights(config.soft_weight * soft_M, torch.ones_like(soft_M))
