"""Forward KL without bias, from samples of the teacher's tail.

Forward KL is the one divergence here that is linear in the teacher's probabilities, so estimates
whose mean is p give the dense loss and the dense gradient in the mean. It comes in two parts:
stored tokens exactly, by :func:`student_train.losses.forward_kl.forward_kl` on
:func:`head_categories`, and the samples, by :func:`sampled_terms`. Samples of the tail add to the
stored tokens; counts cover every token, so they stand alone.
"""

import torch
from torch import Tensor

from student_train.errors import PreflightError
from student_train.losses.base import NEG_INF, PADDING_ID, TeacherRows


def head_categories(rows: TeacherRows, dtype: torch.dtype) -> Tensor:
    """Log-probs of the categories that are compared exactly, [M, C]; they sum to at most one.

    The tail has none. With samples of every token, no stored token has any either.
    """
    categories_MC = rows.categories(dtype)
    covered_MC = torch.ones_like(categories_MC, dtype=torch.bool)
    if not rows.samples_cover_all:
        covered_MC[:, :-1] = False
    return categories_MC.masked_fill(covered_MC, NEG_INF)


def sampled_terms(rows: TeacherRows, student_MS: Tensor) -> tuple[Tensor, Tensor]:
    r"""Value and gradient of the sampled part.

    .. math:: \sum_s w_s (-\log q_s) + c, \quad \partial / \partial \log q_s = -w_s

    The constant c makes the value a forward KL: minus the entropy of what the samples cover, if
    the rows hold the entropy of the full distribution; else c is 0 and the value is larger by
    that entropy. The gradient does not depend on it.

    Args:
        rows: Teacher labels with samples.
        student_MS: float[M, S], the student's log-probs of the sampled tokens, temperature 1;
            anything where the id is ``PADDING_ID``.

    Returns:
        float[M], nats, and float[M, S]. The mean of the whole value over the draws is the dense
        forward KL; a single row may be negative.

    Raises:
        PreflightError: if the rows hold no samples.
    """
    if rows.tail_ids_MS is None or rows.tail_weights_MS is None:
        raise PreflightError(
            "tail: sampled needs samples of the teacher's tail, and the labels hold none; label "
            "with a column of type stratified, threshold or counts, or set tail: bucket"
        )
    unused_MS = rows.tail_ids_MS == PADDING_ID
    weights_MS = rows.tail_weights_MS.to(student_MS.dtype).masked_fill(unused_MS, 0.0)
    surprise_MS = torch.where(weights_MS > 0, -student_MS, 0.0)
    value_M = (weights_MS * surprise_MS).sum(dim=-1)
    return value_M + _constant(rows, student_MS.dtype), -weights_MS


def _constant(rows: TeacherRows, dtype: torch.dtype) -> Tensor:
    """Sum of ``p log p`` over what the samples cover, [M]; 0 where the entropy is not stored."""
    if rows.entropy_M is None:
        return torch.zeros_like(rows.log_tail_mass_M, dtype=dtype)
    head_MC = head_categories(rows, torch.float64)
    head = head_MC.exp()
    stored_M = torch.where(head > 0, head * head_MC, 0.0).sum(dim=-1)
    return (-rows.entropy_M.double() - stored_M).to(dtype)
