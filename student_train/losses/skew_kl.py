"""Skew KL: one side is compared with a mixture of both, which keeps every ratio finite."""

import math

import torch
from torch import Tensor


def skew_forward_kl(
    teacher_MC: Tensor, student_MC: Tensor, *, skew: float
) -> tuple[Tensor, Tensor]:
    r"""Value and gradient of the skew forward KL on the k+1 categories.

    .. math:: KL(p \| m), \quad m = \lambda p + (1 - \lambda) q, \quad
        \partial / \partial \log q_c = -(1 - \lambda) p_c q_c / m_c

    At most -log(lambda). Shapes and units: :class:`student_train.losses.base.Divergence`.

    Args:
        teacher_MC: Log-probs of the teacher.
        student_MC: Log-probs of the student.
        skew: lambda, the weight of the teacher in the mixture, from 0 (forward KL) to below 1.

    Source: DistiLLM (Ko et al., ICML 2024, arXiv 2402.03898), SKL. Their code returns the
    cross-entropy part alone; the value here subtracts the teacher's entropy, the gradient is the
    same.
    """
    mixture_MC = _mix(teacher_MC, student_MC, skew)
    teacher = teacher_MC.exp()
    terms = torch.where(teacher > 0, teacher * (teacher_MC - mixture_MC), 0.0)
    # the student's share of the mixture, at most 1: the ratio itself is never formed
    share = torch.where(
        student_MC.exp() > 0, student_MC + math.log1p(-skew) - mixture_MC, -math.inf
    )
    return terms.sum(dim=-1), -teacher * share.exp()


def skew_reverse_kl(
    teacher_MC: Tensor, student_MC: Tensor, *, skew: float
) -> tuple[Tensor, Tensor]:
    r"""Value and gradient of the skew reverse KL on the k+1 categories.

    .. math:: KL(q \| m), \quad m = (1 - \lambda) p + \lambda q, \quad
        \partial / \partial \log q_c = q_c (\log q_c - \log m_c + 1 - \lambda q_c / m_c)

    At most -log(lambda). Shapes and units: :class:`student_train.losses.base.Divergence`.

    Args:
        teacher_MC: Log-probs of the teacher.
        student_MC: Log-probs of the student.
        skew: lambda, the weight of the student in the mixture, above 0 and below 1.

    Source: DistiLLM (Ko et al., ICML 2024, arXiv 2402.03898), SRKL.
    """
    mixture_MC = _mix(teacher_MC, student_MC, 1 - skew)
    student = student_MC.exp()
    gap = torch.where(student > 0, student_MC - mixture_MC, 0.0)
    return (student * gap).sum(dim=-1), student * (gap + 1 - skew * gap.exp())


def _mix(teacher_MC: Tensor, student_MC: Tensor, teacher_weight: float) -> Tensor:
    """Log of ``teacher_weight * p + (1 - teacher_weight) * q``."""
    if teacher_weight == 0:
        return student_MC
    return torch.logaddexp(
        teacher_MC + math.log(teacher_weight), student_MC + math.log1p(-teacher_weight)
    )
