"""Labels from dense log-probs on the device that computed them, in float64 torch.

The arithmetic is that of ``storage/dense.py``, for vocabularies and responses of real size: a
caller hands over a few rows at a time, so a long response never lies in memory as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.columns import LOG_POWER_SUM, TAIL_IDS, TAIL_WEIGHTS, exponent, scalar_columns
from storage.keys import LabelSetSpec
from storage.labels import label_kind
from storage.labels.base import UNUSED_ID
from storage.tail import LOG_ZERO
from storage.tail_samples import draw_tail_samples, tail_uniforms, uniforms_needed

CHUNK_ROWS = 64
"""Rows that are reduced to labels at once: 64 rows of 150 000 float64 are 77 MB."""


@dataclass(frozen=True, slots=True)
class RowLabels:
    """Labels of N positions; the fields are those of ``storage.samples.LabelledSample``."""

    token_logprob_N: npt.NDArray[np.float32]
    token_rank_N: npt.NDArray[np.int32]
    log_tail_mass_N: npt.NDArray[np.float32]
    topk_ids_NK: npt.NDArray[np.int32]
    topk_logprobs_NK: npt.NDArray[np.float32]
    optional: dict[str, npt.NDArray[Any]]


def label_rows(
    logprobs_NV: Tensor,
    token_ids_N: npt.NDArray[np.integer],
    positions_N: npt.NDArray[np.integer],
    spec: LabelSetSpec,
    key: str,
) -> RowLabels:
    """Labels of N positions of a response.

    Args:
        logprobs_NV: float32[N, V], nats, over every row of the output layer.
        token_ids_N: int[N], the response tokens.
        positions_N: int[N], their positions in the response.
        spec: Which labels.
        key: Sample key; it decides the random numbers of tail samples.
    """
    live_NV = logprobs_NV[:, : spec.vocab_size]
    topk = live_NV.topk(spec.kind.width, dim=-1)
    top_NK = topk.values.cpu().numpy()
    kept_NK = np.arange(top_NK.shape[1]) < label_kind(spec.kind).head_sizes(top_NK)[:, None]
    ids_NK = np.where(kept_NK, topk.indices.cpu().numpy(), UNUSED_ID).astype(np.int32)
    tokens = torch.as_tensor(np.asarray(token_ids_N, np.int64), device=live_NV.device)
    token_N1 = live_NV.gather(1, tokens[:, None])
    exact_NV = logprobs_NV.double()
    probabilities_NV = exact_NV.exp()
    head_NK = probabilities_NV.gather(1, topk.indices)
    left_NK = head_NK.masked_fill(torch.as_tensor(kept_NK, device=head_NK.device), 0.0)
    tail_N = probabilities_NV.scatter(1, topk.indices, left_NK).sum(dim=-1).log()
    optional: dict[str, npt.NDArray[Any]] = {
        name: _scalar(name, exact_NV, probabilities_NV).float().cpu().numpy()
        for name in scalar_columns(spec.columns)
    }
    if spec.tail_samples is not None:
        optional[TAIL_IDS], optional[TAIL_WEIGHTS] = draw_tail_samples(
            spec.tail_samples,
            probabilities_NV.cpu().numpy(),
            ids_NK,
            tail_uniforms(key, positions_N, uniforms_needed(spec.tail_samples)),
            vocab_size=spec.vocab_size,
        )
    return RowLabels(
        token_logprob_N=token_N1[:, 0].cpu().numpy(),
        token_rank_N=(1 + (live_NV > token_N1).sum(dim=-1)).int().cpu().numpy(),
        log_tail_mass_N=tail_N.clamp_min(LOG_ZERO).float().cpu().numpy(),
        topk_ids_NK=ids_NK,
        topk_logprobs_NK=np.where(kept_NK, top_NK, np.float32(-np.inf)),
        optional=optional,
    )


def _scalar(name: str, logprobs_NV: Tensor, probabilities_NV: Tensor) -> Tensor:
    """An optional scalar column by its Arrow name, float64[N]."""
    if name == "entropy":
        return -_mean(logprobs_NV, probabilities_NV)
    tempered_NV = exponent(name) * logprobs_NV
    if name.startswith(LOG_POWER_SUM):
        return tempered_NV.logsumexp(dim=-1)
    return _mean(logprobs_NV, tempered_NV.softmax(dim=-1))


def _mean(values_NV: Tensor, weights_NV: Tensor) -> Tensor:
    """Weighted sum of every row; what has no weight counts for nothing, infinite or not."""
    return (weights_NV * torch.where(weights_NV > 0, values_NV, 0.0)).sum(dim=-1)


def joined(parts: Sequence[RowLabels]) -> RowLabels:
    """Labels of successive positions as one."""
    width = max(part.optional[TAIL_IDS].shape[1] if _sampled(part) else 0 for part in parts)
    return RowLabels(
        token_logprob_N=np.concatenate([part.token_logprob_N for part in parts]),
        token_rank_N=np.concatenate([part.token_rank_N for part in parts]),
        log_tail_mass_N=np.concatenate([part.log_tail_mass_N for part in parts]),
        topk_ids_NK=np.concatenate([part.topk_ids_NK for part in parts]),
        topk_logprobs_NK=np.concatenate([part.topk_logprobs_NK for part in parts]),
        optional={
            name: np.concatenate([_widened(name, part.optional[name], width) for part in parts])
            for name in parts[0].optional
        },
    )


def _sampled(part: RowLabels) -> bool:
    return TAIL_IDS in part.optional


def _widened(name: str, values: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Tail samples with unused entries up to a common width; scalars as they are."""
    if values.ndim == 1:
        return values
    unused = UNUSED_ID if name == TAIL_IDS else 0
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=unused)
