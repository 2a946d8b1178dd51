"""Arithmetic of the probability mass outside the stored tokens, in float64 numpy.

Everything is in nats. The tail is compared as one bucket beside the k stored tokens.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]

LOG_ZERO = -100.0
"""Stored in place of a log tail mass of minus infinity (e**-100 is below 1e-43)."""


def logsumexp(values_NK: Floats) -> Floats:
    """``log sum_k exp(values)`` of every row, float64[N]."""
    values = values_NK.astype(np.float64)
    top = values.max(axis=-1, keepdims=True)
    result: Floats = (top + np.log(np.exp(values - top).sum(axis=-1, keepdims=True)))[..., 0]
    return result


def log1mexp(values: Floats) -> Floats:
    """``log(1 - exp(x))`` for x <= 0, accurate on both sides of -ln 2; -inf at 0."""
    x = np.minimum(values.astype(np.float64), 0.0)
    with np.errstate(divide="ignore"):
        result: Floats = np.where(
            x > -np.log(2.0), np.log(-np.expm1(x)), np.log1p(-np.exp(np.minimum(x, -1e-300)))
        )
    return result


def log_tail_mass_of(topk_logprobs_NK: Floats) -> Floats:
    """Log mass outside the top-k derived from the top-k itself, float64[N], at least LOG_ZERO.

    Only for engines that report nothing better: it cancels when the tail is small (an error of
    2e-4 nats at a tail of 1e-4, and worse below).
    """
    return np.maximum(log1mexp(logsumexp(topk_logprobs_NK)), LOG_ZERO)


def normalized_categories(topk_logprobs_NK: Floats, log_tail_mass_N: Floats) -> Floats:
    """The k+1 categories (k tokens, then the tail) as log-probs that sum to one, float64[N, K+1].

    The stored values are rounded; normalising once keeps every divergence non-negative.
    """
    both = np.concatenate([topk_logprobs_NK, log_tail_mass_N[:, None]], axis=1).astype(np.float64)
    result: Floats = both - logsumexp(both)[:, None]
    return result
