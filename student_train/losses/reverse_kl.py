"""Reverse KL: the student avoids what the teacher would not say."""

import torch
from torch import Tensor

LOG_FLOOR = -30.0
"""Teacher log-probs below this count as this: reverse KL is infinite where the teacher has no
mass and the student has some. Part of the definition of the loss."""


def reverse_kl(teacher_MC: Tensor, student_MC: Tensor) -> tuple[Tensor, Tensor]:
    r"""Value and gradient of the reverse KL on the k+1 categories.

    .. math:: KL(q \| p) = \sum_c q_c (\log q_c - \log p_c), \quad
        \partial / \partial \log q_c = q_c (\log q_c - \log p_c + 1)

    Shapes and units: :class:`student_train.losses.base.Divergence`.

    Source: MiniLLM (ICLR 2024), equation 1, single-step form.
    """
    student = student_MC.exp()
    gap = torch.where(student > 0, student_MC - teacher_MC.clamp_min(LOG_FLOOR), 0.0)
    return (student * gap).sum(dim=-1), student * (gap + 1)
