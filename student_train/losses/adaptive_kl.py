"""Adaptive KL: forward and reverse KL, weighted row by row. Two published rules for the weight.

Both share the form ``w KL(p || q) + (1 - w) KL(q || p)``. :func:`adaptive_kl` sets w by where the
two distributions differ, :func:`entropy_adaptive_kl` by which of them is surer.
"""

from typing import Literal

import torch
from torch import Tensor

from student_train.losses.forward_kl import forward_kl
from student_train.losses.reverse_kl import reverse_kl


def adaptive_kl(
    teacher_MC: Tensor,
    student_MC: Tensor,
    *,
    head_mass: float,
    head: Literal["reach", "within"],
    through_weights: bool,
    log_floor: float,
) -> tuple[Tensor, Tensor]:
    r"""Value and gradient of the adaptive KL by head and tail gaps, on the k+1 categories.

    .. math:: w = \frac{h}{h + t}, \quad h = \sum_{c \in head} |p_c - q_c|, \quad
        t = \sum_{c \notin head} |p_c - q_c|

    The *head* of a row are the likeliest tokens of the teacher. With ``reach`` these are the fewest
    that have ``head_mass`` together: each whose likelier ones have less. With ``within`` they are
    the most that do not have more, the likeliest in any case. Tokens of equal probability are in it
    together, so the order of the vocabulary does not matter; the tail category never belongs to it.
    Where both gaps are 0 the weight is 1, and the value 0. Shapes and units:
    :class:`student_train.losses.base.Divergence`.

    Args:
        teacher_MC: Log-probs of the teacher.
        student_MC: Log-probs of the student.
        head_mass: mu of the paper.
        head: Where the token belongs that crosses ``head_mass``.
        through_weights: Whether the gradient runs through w.
        log_floor: As in :func:`student_train.losses.reverse_kl.reverse_kl`.

    Source: Wu et al., COLING 2025 (arXiv 2404.02657): ``reach``; the authors' code: ``within``.
    TAID's copy applies the head mask, made in sorted order, to unsorted probabilities.
    """
    teacher, student = teacher_MC.exp(), student_MC.exp()
    is_head = _head(teacher, head_mass, head)
    gap = student - teacher
    distance = gap.abs()
    in_head = torch.where(is_head, distance, 0.0).sum(dim=-1, keepdim=True)
    total = distance.sum(dim=-1, keepdim=True)
    weight = torch.where(total > 0, in_head / total, 1.0)
    slope = None
    if through_weights:
        # w = h / (h + t): dw = ([c in head] - w) d|p - q| / (h + t)
        away = torch.where(total > 0, student * torch.sign(gap) / total, 0.0)
        slope = (is_head.to(teacher.dtype) - weight) * away
    return _weighted(teacher_MC, student_MC, weight, slope, log_floor)


def entropy_adaptive_kl(
    teacher_MC: Tensor,
    student_MC: Tensor,
    *,
    sharpness: float,
    through_weights: bool,
    log_floor: float,
) -> tuple[Tensor, Tensor]:
    r"""Value and gradient of the adaptive KL by entropies, on the k+1 categories.

    .. math:: w = \frac{e^{-\mu H(p)}}{e^{-\mu H(p)} + e^{-\mu H(q)}}

    Forward KL weighs more where the teacher is surer than the student. Entropies are those of the
    categories on both sides. Shapes and units: :class:`student_train.losses.base.Divergence`.

    Args:
        teacher_MC: Log-probs of the teacher.
        student_MC: Log-probs of the student.
        sharpness: mu, per nat.
        through_weights: Whether the gradient runs through w.
        log_floor: As in :func:`student_train.losses.reverse_kl.reverse_kl`.

    Source: the authors' release of Bridge-Garden (ICML 2026), divergence ``akl``.
    """
    surer = _entropy(student_MC) - _entropy(teacher_MC)
    weight = torch.sigmoid(sharpness * surer)
    slope = None
    if through_weights:
        student = student_MC.exp()
        # the derivative of q log q with respect to log q
        change = torch.where(student > 0, student * (student_MC + 1), 0.0)
        slope = -sharpness * weight * (1 - weight) * change
    return _weighted(teacher_MC, student_MC, weight, slope, log_floor)


def _weighted(
    teacher_MC: Tensor,
    student_MC: Tensor,
    weight_M1: Tensor,
    slope_MC: Tensor | None,
    log_floor: float,
) -> tuple[Tensor, Tensor]:
    """``w F + (1 - w) R``; ``slope_MC`` is the derivative of w, None where w is held fixed."""
    forward_M, forward_MC = forward_kl(teacher_MC, student_MC)
    reverse_M, reverse_MC = reverse_kl(teacher_MC, student_MC, log_floor=log_floor)
    weight_M = weight_M1.squeeze(-1)
    value_M = weight_M * forward_M + (1 - weight_M) * reverse_M
    gradient_MC = weight_M1 * forward_MC + (1 - weight_M1) * reverse_MC
    if slope_MC is not None:
        gradient_MC = gradient_MC + (forward_M - reverse_M).unsqueeze(-1) * slope_MC
    return value_M, gradient_MC


def _head(teacher: Tensor, head_mass: float, rule: Literal["reach", "within"]) -> Tensor:
    """bool[M, C]: the teacher's likeliest tokens."""
    stored = teacher[:, :-1]
    ordered, order = stored.sort(dim=-1, descending=True)
    up_to = ordered.cumsum(dim=-1)
    another = torch.ones_like(ordered, dtype=torch.bool)
    another[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # of equal tokens each counts as if it came first
    likelier = torch.where(another, up_to - ordered, 0.0).cummax(dim=-1).values
    if rule == "reach":
        chosen = likelier < head_mass
    else:
        # ... and as if it came last
        last = another.roll(-1, dims=-1)
        as_likely = torch.where(last, up_to, torch.inf).flip(-1).cummin(dim=-1).values.flip(-1)
        chosen = (as_likely <= head_mass) | (ordered == ordered[:, :1])
    chosen = chosen & (ordered > 0)
    head = torch.zeros_like(teacher, dtype=torch.bool)
    head[:, :-1] = torch.zeros_like(chosen).scatter(-1, order, chosen)
    return head


def _entropy(logprobs_MC: Tensor) -> Tensor:
    probabilities = logprobs_MC.exp()
    terms = torch.where(probabilities > 0, probabilities * logprobs_MC, 0.0)
    return -terms.sum(dim=-1, keepdim=True)
