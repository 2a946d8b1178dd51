"""TAID: the target moves from the student itself to the teacher while training goes on.

This is the objective at one interpolation parameter t. What moves t is a schedule, kept outside:
the divergence is made anew for every optimiser step.
"""

from typing import Literal

import torch
from torch import Tensor


def taid(
    teacher_MC: Tensor,
    student_MC: Tensor,
    *,
    t: float,
    value: Literal["cross_entropy", "kl"],
    log_floor: float,
) -> tuple[Tensor, Tensor]:
    r"""Value and gradient of TAID on the k+1 categories.

    .. math:: r \propto q^{1-t} p^t, \quad -\sum_c r_c \log q_c, \quad
        \partial / \partial \log q_c = -r_c

    The target r is held fixed. It interpolates logits, so log-probs serve as well: what differs
    is a constant of the row. At t = 0 the gradient is 0, at t = 1 it is that of forward KL.
    Shapes and units: :class:`student_train.losses.base.Divergence`.

    Args:
        teacher_MC: Log-probs of the teacher.
        student_MC: Log-probs of the student.
        t: Interpolation parameter, from 0 (the student) to 1 (the teacher).
        value: ``cross_entropy`` as published, or ``kl``: without the entropy of r.
        log_floor: Teacher log-probs below this count as this where the student has mass, nats;
            else a token that the teacher never says would leave the target at any t above 0.

    Source: TAID (Shing et al., ICLR 2025, arXiv 2501.16937), and the authors' code, which returns
    the cross-entropy where the paper has the KL.
    """
    # categories without student mass stay out of the target, unused ones among them
    mixed_MC = torch.where(
        student_MC.exp() > 0,
        (1 - t) * student_MC + t * teacher_MC.clamp_min(log_floor),
        -torch.inf,
    )
    target_MC = mixed_MC.log_softmax(dim=-1)
    target = target_MC.exp()
    against = -student_MC if value == "cross_entropy" else target_MC - student_MC
    return torch.where(target > 0, target * against, 0.0).sum(dim=-1), -target
