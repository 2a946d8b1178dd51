"""The teacher at another temperature, from its log-probs at temperature 1 and its power sums.

At temperature T the teacher's log-probs are ``log p / T - L(1 / T)`` with ``L(alpha)`` the log of
the sum of ``p ** alpha`` over the full vocabulary. That sum is not in the top-k: the label set has
to hold it (``docs/format.md`` section 4.4).
"""

import math
from typing import Final

import torch
from torch import Tensor

from storage.columns import POWERS
from storage.labels.topk import MAX_VOCAB_SIZE
from student_train.errors import PreflightError
from student_train.losses.base import TeacherRows
from student_train.losses.config import stored_power

INTERPOLATION_ERROR: Final = 0.1
"""Largest error of a category's probability between two stored exponents, for temperatures from 1
to 4, whatever the teacher and however few tokens a row stores. A search for the worst tail found
0.08: some likely tokens and 150 000 of 1e-13. Smooth tails stay within 0.01, those of real labels
within 0.001. At stored exponents only the rounding of labels is left."""

LARGEST_TAIL: Final = math.log(MAX_VOCAB_SIZE)
"""Log of how many tokens a tail can have."""


def teacher_categories_at(rows: TeacherRows, temperature: float, dtype: torch.dtype) -> Tensor:
    """Log-probs of the k+1 categories at a temperature, [M, C], normalised to sum to one.

    The stored tokens are exact. The tail is what the power sum holds beyond them; between two
    stored exponents it is the tail that is interpolated, which is far smoother than the whole.

    Raises:
        PreflightError: if the rows lack the power sums.
    """
    if temperature == 1:
        return rows.categories(dtype)
    alpha = 1 / temperature
    # float64: the tail is a difference, and there are only K + 1 numbers to a row
    categories_MC = rows.categories(torch.float64)
    tail_M = _interpolated_tail(rows, categories_MC, alpha)
    tail_M = torch.where(torch.isneginf(categories_MC[:, -1]), categories_MC[:, -1], tail_M)
    warm_MC = torch.cat([alpha * categories_MC[:, :-1], tail_M.unsqueeze(-1)], dim=-1)
    return (warm_MC - warm_MC.logsumexp(dim=-1, keepdim=True)).to(dtype)


def _interpolated_tail(rows: TeacherRows, categories_MC: Tensor, alpha: float) -> Tensor:
    """Log of the sum of ``p ** alpha`` over the tail, float64[M]: stored, or a cubic between."""
    power = stored_power(alpha)
    if power is not None and power in rows.log_power_sums:
        return _tail_sum(categories_MC, alpha, rows.log_power_sums[power].double())
    knots = sorted(POWERS[name] for name in rows.power_slopes if name in rows.log_power_sums)
    knots += [] if rows.entropy_M is None else [1.0]
    below = [knot for knot in knots if knot < alpha]
    above = [knot for knot in knots if knot > alpha]
    if not below or not above:
        raise PreflightError(
            f"temperature {1 / alpha:g} needs the sum of p**{alpha:g}; the labels hold exponents "
            f"{sorted(POWERS[name] for name in rows.log_power_sums)}, with slopes {knots}; label "
            "with power_sums and entropy, or set temperature: 1"
        )
    low, high = below[-1], above[0]
    value_low, slope_low = _tail_knot(rows, categories_MC, low)
    value_high, slope_high = _tail_knot(rows, categories_MC, high)
    width = high - low
    # the curve is convex: the chord is as steep as neither end
    chord = (value_high - value_low) / width
    slope_low, slope_high = torch.minimum(slope_low, chord), torch.maximum(slope_high, chord)
    x = (alpha - low) / width
    return (
        (1 + 2 * x) * (1 - x) ** 2 * value_low
        + x * (1 - x) ** 2 * width * slope_low
        + x**2 * (3 - 2 * x) * value_high
        - x**2 * (1 - x) * width * slope_high
    )


def _tail_knot(rows: TeacherRows, categories_MC: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Log of the tail's sum of ``p ** alpha`` and its slope in alpha, float64[M] each."""
    log_p_MK = categories_MC[:, :-1]
    if alpha == 1:
        assert rows.entropy_M is not None
        sum_M, slope_M = torch.zeros_like(log_p_MK[:, 0]), -rows.entropy_M.double()
        tail_M = categories_MC[:, -1]
    else:
        power = stored_power(alpha)
        assert power is not None
        sum_M, slope_M = rows.log_power_sums[power].double(), rows.power_slopes[power].double()
        tail_M = _tail_sum(categories_MC, alpha, sum_M)
    # slopes are means of log p under p ** alpha; that of the whole is made of head and tail
    weight_MK = (alpha * log_p_MK - sum_M.unsqueeze(-1)).exp()
    head_M = torch.where(weight_MK > 0, weight_MK * log_p_MK, 0.0).sum(dim=-1)
    mean_M = (slope_M - head_M) / (tail_M - sum_M).exp().clamp_min(torch.finfo(sum_M.dtype).tiny)
    # What is left of a small tail after rounding may be nonsense; these bounds hold for any tail:
    # an entropy from 0 to that of LARGEST_TAIL tokens, and no token likelier than a stored one.
    highest_M = torch.minimum(tail_M / alpha, _likeliest(categories_MC))
    return tail_M, torch.minimum(mean_M.clamp_min((tail_M - LARGEST_TAIL) / alpha), highest_M)


def _tail_sum(categories_MC: Tensor, alpha: float, sum_M: Tensor) -> Tensor:
    """Log of the sum of ``p ** alpha`` over the tail, given that over everything, float64[M].

    A difference, and stored log-probs are rounded; two bounds hold for every tail. A tail token
    has p <= m, the least stored probability or the whole tail, so p ** alpha = p * p ** (alpha - 1)
    is at least p * m ** (alpha - 1) for alpha below 1, and at most that above. And at a given mass
    the sum is furthest from it, above or below, where LARGEST_TAIL tokens share it evenly.
    """
    head_M = (alpha * categories_MC[:, :-1]).logsumexp(dim=-1)
    rest_M = sum_M + _log1mexp((head_M - sum_M).clamp_max(0.0))
    log_tail_M = categories_MC[:, -1]
    steep_M = log_tail_M + (alpha - 1) * _likeliest(categories_MC)
    even_M = alpha * log_tail_M + (1 - alpha) * LARGEST_TAIL
    lowest_M, highest_M = (steep_M, even_M) if alpha < 1 else (even_M, steep_M)
    return torch.minimum(torch.maximum(rest_M, lowest_M), highest_M)


def _likeliest(categories_MC: Tensor) -> Tensor:
    """Log of what no tail token exceeds, [M]: the least stored probability, and the tail's."""
    stored_MK, log_tail_M = categories_MC[:, :-1], categories_MC[:, -1]
    least_M = torch.where(torch.isneginf(stored_MK), 0.0, stored_MK).amin(dim=-1)
    return torch.minimum(least_M, log_tail_M)


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x of 0 or less, without cancellation at either end."""
    near = x > -math.log(2)
    # each branch sees only what it can take, so none of them makes a NaN
    small = (-torch.expm1(torch.where(near, x, -1.0))).log()
    return torch.where(near, small, torch.log1p(-torch.where(near, -1.0, x).exp()))
