"""What becomes of the tokens outside the stored ones: treatments around any divergence.

``bucket`` needs none: the tail is a category like the others. The two here are biased, and kept to
measure that (``docs/losses.md`` section 4).
"""

import torch
from torch import Tensor

from student_train.losses.base import NEG_INF, Divergence


def renormalised(divergence: Divergence) -> Divergence:
    """Compare both distributions on the stored tokens alone, each renormalised there.

    The student's probability outside the stored tokens gets no gradient at all.
    """

    def compare(teacher_MC: Tensor, student_MC: Tensor) -> tuple[Tensor, Tensor]:
        student_kept_MC = without_tail(student_MC)
        value_M, kept_MC = divergence(without_tail(teacher_MC), student_kept_MC)
        # d log (q_i / Q) / d log q_j = [i = j] - q_j / Q; the tail is in neither
        moved_M1 = kept_MC.sum(dim=-1, keepdim=True)
        return value_M, kept_MC - student_kept_MC.exp() * moved_M1

    return compare


def emptied(divergence: Divergence) -> Divergence:
    """Compare as if the teacher gave the stored tokens all the probability."""

    def compare(teacher_MC: Tensor, student_MC: Tensor) -> tuple[Tensor, Tensor]:
        return divergence(without_tail(teacher_MC), student_MC)

    return compare


def without_tail(logprobs_MC: Tensor) -> Tensor:
    """Log-probs of the stored tokens given that it is one of them; the tail gets -inf."""
    stored_MK = logprobs_MC[:, :-1]
    top_M1 = stored_MK.amax(dim=-1, keepdim=True)
    # nothing is stored, or nothing of it has mass: leave it so
    kept_MK = torch.where(torch.isneginf(top_M1), stored_MK, stored_MK.log_softmax(dim=-1))
    return torch.cat([kept_MK, torch.full_like(top_M1, NEG_INF)], dim=-1)
