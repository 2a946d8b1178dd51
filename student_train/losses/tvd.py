"""Total variation distance: half the summed difference of the probabilities."""

import torch
from torch import Tensor


def tvd(teacher_MC: Tensor, student_MC: Tensor) -> tuple[Tensor, Tensor]:
    r"""Value and gradient of the total variation distance on the k+1 categories.

    .. math:: \frac12 \sum_c |p_c - q_c|, \quad
        \partial / \partial \log q_c = \frac12 q_c \, sign(q_c - p_c)

    Between 0 and 1, not in nats. Where p and q are equal the gradient is 0, one of its
    subgradients. Shapes: :class:`student_train.losses.base.Divergence`.

    Source: Wen et al., ACL 2023 (f-DISTILL, arXiv 2307.15190), token by token.
    """
    student = student_MC.exp()
    gap = student - teacher_MC.exp()
    return gap.abs().sum(dim=-1) / 2, student * torch.sign(gap) / 2
