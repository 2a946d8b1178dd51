"""Forward KL: the student covers everything the teacher may say."""

import torch
from torch import Tensor


def forward_kl(teacher_MC: Tensor, student_MC: Tensor) -> tuple[Tensor, Tensor]:
    r"""Value and gradient of the forward KL on the k+1 categories.

    .. math:: KL(p \| q) = \sum_c p_c (\log p_c - \log q_c), \quad
        \partial / \partial \log q_c = -p_c

    Zero only where the student equals the teacher; a lower bound of the dense KL, exact when
    K = V or when both tails have the same shape (``docs/losses.md`` section 2). Infinite where the
    student has no mass and the teacher has some. Shapes and units:
    :class:`student_train.losses.base.Divergence`.

    Source: Hinton et al. 2015, on categories as in ``docs/losses.md``.
    """
    teacher = teacher_MC.exp()
    terms = torch.where(teacher > 0, teacher * (teacher_MC - student_MC), 0.0)
    return terms.sum(dim=-1), -teacher
