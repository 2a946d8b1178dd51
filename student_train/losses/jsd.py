"""Generalised Jensen-Shannon divergence: both compared with their mixture."""

import math

import torch
from torch import Tensor

from student_train.losses.forward_kl import forward_kl
from student_train.losses.reverse_kl import reverse_kl


def jsd(
    teacher_MC: Tensor, student_MC: Tensor, *, beta: float, log_floor: float
) -> tuple[Tensor, Tensor]:
    r"""Value and gradient of the generalised Jensen-Shannon divergence on the k+1 categories.

    .. math:: \beta KL(p \| m) + (1 - \beta) KL(q \| m), \quad m = \beta p + (1 - \beta) q, \quad
        \partial / \partial \log q_c = (1 - \beta) q_c (\log q_c - \log m_c)

    Bounded, by log 2 at beta = 0.5: a token without mass on one side costs finitely much, so no
    floor is needed. Towards both ends the formula goes to 0 like beta (1 - beta), and divided by
    that to forward and to reverse KL, which it is at beta = 0 and at beta = 1. Shapes and units:
    :class:`student_train.losses.base.Divergence`.

    Args:
        teacher_MC: Log-probs of the teacher.
        student_MC: Log-probs of the student.
        beta: Weight of the teacher in the mixture, from 0 to 1.
        log_floor: Of reverse KL, at beta = 1 only.

    Source: GKD (Agarwal et al., ICLR 2024, arXiv 2306.13649), JSD(beta); the two ends as in TRL.
    """
    if beta == 0:
        return forward_kl(teacher_MC, student_MC)
    if beta == 1:
        return reverse_kl(teacher_MC, student_MC, log_floor=log_floor)
    mixture_MC = torch.logaddexp(teacher_MC + math.log(beta), student_MC + math.log1p(-beta))
    teacher, student = teacher_MC.exp(), student_MC.exp()
    from_teacher = torch.where(teacher > 0, beta * teacher * (teacher_MC - mixture_MC), 0.0)
    from_student = torch.where(student > 0, (1 - beta) * student * (student_MC - mixture_MC), 0.0)
    return (from_teacher + from_student).sum(dim=-1), from_student
