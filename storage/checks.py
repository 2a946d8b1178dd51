"""How rows of labels are refused: the first bad one is named."""

import numpy as np
import numpy.typing as npt

from storage.errors import BadLabelError

MASS_TOLERANCE = 1e-3
"""Allowed difference of the total probability from one: float32 sums stay far below."""


def require_rows(
    good: npt.NDArray[np.bool_], problem: str, error: type[BadLabelError] = BadLabelError
) -> None:
    """Raise ``error`` with the problem and the first row that is not good.

    Args:
        good: bool[N], or bool[N, M] of which every entry of a row has to be true.
        problem: What is wrong with the others.
        error: What to raise.
    """
    if not good.all():
        good_N = good.reshape(len(good), -1).all(axis=1)
        raise error(f"{problem} at labelled position {int(np.argmin(good_N))}")
