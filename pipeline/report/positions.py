"""How sure the teacher is, position by position: bridge-like and garden-like ones.

The confidence of a position is the probability of its likeliest token. A bridge needs its exact
token, so the teacher is sure; a garden has many good continuations, so it is not (The Bridge-Garden
Dilemma in LLM Distillation, arXiv 2605.26246). That paper weighs positions gradually and draws no
line: the two thresholds here are conventions of the report.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.inspection.measures import MEASURES
from storage.samples import LabelledSample

BRIDGE: Final = 0.9
"""A position is bridge-like if its likeliest token has at least this probability."""
GARDEN: Final = 0.5
"""It is garden-like if the likeliest token has less: no token has the majority."""
CONFIDENCE_EDGES: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ENTROPY_EDGES: Final = MEASURES["entropy"].edges
MAX_POSITIONS: Final = 2**18
"""Positions after which no further sample is read: shares are exact to 0.2 % then."""

Floats = npt.NDArray[np.float64]


def position_shares(samples: Iterable[LabelledSample], *, of_samples: int) -> dict[str, Any] | None:
    """Shares of positions by confidence and by entropy; None without any position.

    Args:
        samples: In an order that says nothing about them, such as that of their keys: the first
            ones stand for all where there are more than ``MAX_POSITIONS`` positions.
        of_samples: How many there are.
    """
    confidences: list[Floats] = []
    entropies: list[Floats] = []
    first_drawn: list[npt.NDArray[np.bool_]] = []
    num_positions = 0
    for sample in samples:
        confidences.append(np.exp(sample.topk_logprobs_NK[:, 0].astype(np.float64)))
        first_drawn.append(sample.token_rank_N == 1)
        if sample.entropy_N is not None:
            entropies.append(sample.entropy_N.astype(np.float64))
        num_positions += len(sample.positions_N)
        if num_positions >= MAX_POSITIONS:
            break
    if num_positions == 0:
        return None
    # log-probs are stored rounded: a certain token can read as a little more than 1
    confidence_N = np.minimum(np.concatenate(confidences), 1.0)
    likeliest_N = np.concatenate(first_drawn)
    entropy_N = np.concatenate(entropies) if len(entropies) == len(confidences) else None
    roles = {
        "bridge-like": confidence_N >= BRIDGE,
        "between": (confidence_N >= GARDEN) & (confidence_N < BRIDGE),
        "garden-like": confidence_N < GARDEN,
    }
    counts = np.histogram(confidence_N, bins=np.array(CONFIDENCE_EDGES))[0]
    return {
        "samples": len(confidences),
        "of_samples": of_samples,
        "positions": num_positions,
        "thresholds": {"bridge": BRIDGE, "garden": GARDEN},
        "roles": [
            {"role": role, **_role(mask_N, entropy_N, likeliest_N)}
            for role, mask_N in roles.items()
        ],
        "mean_confidence": float(confidence_N.mean()),
        "confidence": [
            {"low": low, "high": high, **_share(int(count), num_positions)}
            for (low, high), count in zip(pairwise(CONFIDENCE_EDGES), counts, strict=True)
        ],
        "mean_entropy": None if entropy_N is None else float(entropy_N.mean()),
        "entropy": None if entropy_N is None else _entropy_bins(entropy_N),
    }


def _role(
    mask_N: npt.NDArray[np.bool_], entropy_N: Floats | None, likeliest_N: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    count = int(mask_N.sum())
    known = entropy_N is not None and count > 0
    return {
        **_share(count, len(mask_N)),
        "mean_entropy": float(entropy_N[mask_N].mean()) if known else None,  # type: ignore[index]
        "entropy_share": _ratio(entropy_N, mask_N) if entropy_N is not None else None,
        "likeliest_drawn": float(likeliest_N[mask_N].mean()) if count else None,
    }


def _ratio(entropy_N: Floats, mask_N: npt.NDArray[np.bool_]) -> float:
    total = float(entropy_N.sum())
    return float(entropy_N[mask_N].sum()) / total if total > 0 else 0.0


def _entropy_bins(entropy_N: Floats) -> list[dict[str, Any]]:
    edges = (0.0, *ENTROPY_EDGES, np.inf)
    # entropies that rounding left below 0 belong to the first bin
    counts = np.bincount(np.searchsorted(ENTROPY_EDGES, entropy_N, side="right"), minlength=7)
    return [
        {"low": low, "high": None if np.isinf(high) else high, **_share(int(n), len(entropy_N))}
        for (low, high), n in zip(pairwise(edges), counts, strict=True)
    ]


def _share(count: int, total: int) -> dict[str, Any]:
    return {"count": count, "share": count / total}
