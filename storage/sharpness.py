"""Whether stored distributions are sharper or flatter than the teacher's: a wrong temperature.

Noise of a short dtype goes in all directions, a temperature in one. So a temperature shows long
before its KL rises above the noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from storage.config import Config

Floats = npt.NDArray[np.float64]

SMALLEST: Final = 0.02
"""A temperature that is wrong by less than this passes: it changes a KL by some 1e-4 nats."""

STANDARD_ERRORS: Final = 5.0
"""How many standard errors a sharpness may lie off; 6e-7 of a normal distribution."""


class Sharpness(Config):
    """Inverse temperature of the stored distributions relative to the recomputed ones."""

    value: float
    """Over all rows."""
    limit: float
    """Largest allowed distance from 1."""
    worst_sample: str
    """Sample whose sharpness is furthest from 1 in proportion to its limit."""
    worst_value: float
    worst_limit: float

    def reasons(self) -> list[str]:
        """Why the labels are unfit; empty if they are fit."""
        found = [("the stored distributions", self.value, self.limit)]
        found.append((f"those of sample {self.worst_sample}", self.worst_value, self.worst_limit))
        return [
            f"{what} are {value:.3f} times as sharp as the teacher's (inverse temperature), "
            f"allowed is 1 up to {limit:.3f}"
            for what, value, limit in found
            if not abs(value - 1) <= limit
        ]


@dataclass(frozen=True, slots=True)
class Slope:
    """Regression of the given on the recomputed log-probs of one sample."""

    value: float
    """The inverse temperature at which the recomputed rows resemble the given ones most."""
    standard_error: float
    weight: float
    """Sum of squares of the recomputed log-probs: how much the sample says of the slope."""


def slope_of(given_NK: Floats, recomputed_NK: Floats) -> Slope:
    """The slope of one sample's log-probs.

    Both sides are centred within their row; entries weigh as their recomputed probability. The
    standard error holds for errors of any size in any entry (HC3; the mean of a row follows an
    entry by its probability, which is the entry's leverage).

    Args:
        given_NK: float64[N, K], nats; minus infinity where a row keeps fewer ids.
        recomputed_NK: float64[N, K], of the same ids.

    Source:
        MacKinnon and White, Some heteroskedasticity-consistent covariance matrix estimators with
        improved finite sample properties, Journal of Econometrics 1985.
    """
    used_NK = np.isfinite(recomputed_NK)
    p_NK = np.exp(recomputed_NK)
    p_NK /= p_NK.sum(axis=1, keepdims=True)
    x_NK, y_NK = (
        values_NK - (p_NK * values_NK).sum(axis=1, keepdims=True)
        for values_NK in (np.where(used_NK, side, 0.0) for side in (recomputed_NK, given_NK))
    )
    weight = float((p_NK * x_NK**2).sum())
    if weight == 0:  # one id per row, or all equally likely: nothing to be sharper than
        return Slope(1.0, 0.0, 0.0)
    slope = float((p_NK * x_NK * y_NK).sum()) / weight
    # next to certainty both factors vanish like 1 - p, so the quotient does too
    scores_NK = p_NK * x_NK * (y_NK - slope * x_NK) / np.maximum(1 - p_NK, 1e-9)
    return Slope(slope, float(np.linalg.norm(scores_NK)) / weight, weight)


def sharpness_of(
    slopes: Sequence[Slope], noise: Sequence[Slope], keys: Sequence[str], *, noise_factor: float
) -> Sharpness:
    """Sharpness of all samples and of the worst one.

    Args:
        slopes: Of the stored samples; at least one.
        noise: Of the same samples in the dtype of the set; empty for float32.
        keys: Their sample keys.
        noise_factor: How many times the noise is allowed on top.
    """
    value, standard_error = _pooled(slopes)
    excuse = noise_factor * abs(_pooled(noise)[0] - 1) if noise else 0.0
    single = noise_factor * max((abs(slope.value - 1) for slope in noise), default=0.0)
    limits = [SMALLEST + STANDARD_ERRORS * slope.standard_error + single for slope in slopes]
    worst = max(range(len(slopes)), key=lambda n: abs(slopes[n].value - 1) / limits[n])
    return Sharpness(
        value=value,
        limit=SMALLEST + STANDARD_ERRORS * standard_error + excuse,
        worst_sample=keys[worst],
        worst_value=slopes[worst].value,
        worst_limit=limits[worst],
    )


def _pooled(slopes: Sequence[Slope]) -> tuple[float, float]:
    """The slope over all rows and its standard error.

    The larger of two: with whole samples as the independent units, which needs some of them, and
    with single entries.
    """
    weights = np.array([slope.weight for slope in slopes])
    values = np.array([slope.value for slope in slopes])
    total = float(weights.sum())
    if total == 0:
        return 1.0, 0.0
    value = float((weights * values).sum()) / total
    errors = np.array([slope.standard_error for slope in slopes])
    among, within = (np.linalg.norm(weights * part) for part in (values - value, errors))
    return value, float(max(among, within)) / total
