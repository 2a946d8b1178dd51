"""How much of the teacher's distributions a label set stores, and how its responses ended."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from storage.config import Config
from storage.samples import LabelledSample

KEPT_PERCENTILES: Final = (1, 5, 50)
TAIL_PERCENTILES: Final = (50, 95, 99)


class Coverage(Config):
    """How much of the distributions is stored, and how responses ended."""

    num_samples: int
    num_rows: int
    mean_kept_ids: float
    """Stored ids per row."""
    kept_mass: dict[str, float]
    """Percentiles over rows of the probability of the stored ids; 99 % of rows exceed ``p1``."""
    tail_mass: dict[str, float]
    """Percentiles over rows of the probability outside the stored ids."""
    finish_reasons: dict[str, float]
    """Share of samples by finish reason."""


class CoverageCount:
    """Collects samples one by one; of each row a single number stays."""

    def __init__(self) -> None:
        self._tails: list[npt.NDArray[np.float64]] = []
        self._kept = 0
        self._ends: Counter[str] = Counter()

    def add(self, sample: LabelledSample) -> None:
        """Take up one stored sample."""
        self._tails.append(np.exp(sample.log_tail_mass_N.astype(np.float64)))
        self._kept += int(np.isfinite(sample.topk_logprobs_NK).sum())
        self._ends[sample.finish_reason] += 1

    def result(self) -> Coverage:
        """Coverage of all samples; at least one must have been added."""
        tails_N = np.concatenate(self._tails)
        num_samples = self._ends.total()
        return Coverage(
            num_samples=num_samples,
            num_rows=len(tails_N),
            mean_kept_ids=self._kept / len(tails_N),
            kept_mass=_percentiles(1 - tails_N, KEPT_PERCENTILES),
            tail_mass=_percentiles(tails_N, TAIL_PERCENTILES),
            finish_reasons={end: count / num_samples for end, count in sorted(self._ends.items())},
        )


def _percentiles(values_N: npt.NDArray[np.float64], wanted: Sequence[int]) -> dict[str, float]:
    return {f"p{percent}": float(np.percentile(values_N, percent)) for percent in wanted}
