"""Reverse KL: the student avoids what the teacher would not say."""

import torch
from torch import Tensor


def reverse_kl(
    teacher_MC: Tensor, student_MC: Tensor, *, log_floor: float
) -> tuple[Tensor, Tensor]:
    r"""Value and gradient of the reverse KL on the k+1 categories.

    .. math:: KL(q \| p) = \sum_c q_c (\log q_c - \log p_c), \quad
        \partial / \partial \log q_c = q_c (\log q_c - \log p_c + 1)

    Shapes and units: :class:`student_train.losses.base.Divergence`.

    Args:
        teacher_MC: Log-probs of the teacher.
        student_MC: Log-probs of the student.
        log_floor: Teacher log-probs below this count as this, nats: reverse KL is infinite where
            the teacher has no mass and the student has some. Part of the definition of the loss.

    Source: MiniLLM (ICLR 2024), equation 1, single-step form.
    """
    student = student_MC.exp()
    gap = torch.where(student > 0, student_MC - teacher_MC.clamp_min(log_floor), 0.0)
    return (student * gap).sum(dim=-1), student * (gap + 1)
