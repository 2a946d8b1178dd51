"""Labels from dense log-probs, the obvious way: what every engine must agree with.

Everything is float64 numpy over whole rows of the output layer. Rows may be padded: columns at or
above ``vocab_size`` count for the normalisation, the tail mass, the entropy and the power sums, and
are never stored, ranked or sampled.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from storage.columns import LOG_POWER_SUM, TAIL_IDS, TAIL_WEIGHTS, exponent, scalar_columns
from storage.keys import LabelSetSpec
from storage.labels import label_kind
from storage.labels.base import UNUSED_ID
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.tail import LOG_ZERO, logsumexp
from storage.tail_samples import draw_tail_samples, tail_uniforms, uniforms_needed

Floats = npt.NDArray[np.float64]


def entropy(logprobs_NV: Floats) -> Floats:
    """Shannon entropy ``-sum p log p`` of every row, nats, float64[N]."""
    return -_mean(logprobs_NV, np.exp(logprobs_NV))


def log_power_sum(logprobs_NV: Floats, alpha: float) -> Floats:
    """``L(alpha) = log sum p**alpha`` of every row, nats, float64[N].

    It normalises the distribution at temperature ``1 / alpha``, whose log-probs are
    ``alpha * log p - L(alpha)``.
    """
    result: Floats = logsumexp(alpha * logprobs_NV).astype(np.float64)
    return result


def power_slope(logprobs_NV: Floats, alpha: float) -> Floats:
    """``dL/dalpha``: the mean of ``log p`` at temperature ``1 / alpha``, nats, float64[N]."""
    tempered_NV = np.exp(alpha * logprobs_NV - log_power_sum(logprobs_NV, alpha)[:, None])
    return _mean(logprobs_NV, tempered_NV)


def _mean(values_NV: Floats, weights_NV: Floats) -> Floats:
    """Weighted sum of every row; what has no weight counts for nothing, infinite or not."""
    result: Floats = (weights_NV * np.where(weights_NV > 0, values_NV, 0.0)).sum(axis=1)
    return result


def scalar_column(name: str, logprobs_NV: Floats) -> Floats:
    """An optional scalar column by its Arrow name, float64[N]."""
    if name == "entropy":
        return entropy(logprobs_NV)
    statistic = log_power_sum if name.startswith(LOG_POWER_SUM) else power_slope
    return statistic(logprobs_NV, exponent(name))


def label_sample_densely(
    request: SampleRequest,
    response_R: npt.NDArray[Any],
    logprobs_RV: Floats,
    spec: LabelSetSpec,
    *,
    finish_reason: str = "length",
    stop_reason: str | None = None,
) -> LabelledSample:
    """The sample of a request from the dense log-probs of its response.

    Args:
        request: Its label mask says which positions are labelled.
        response_R: int[R], the response.
        logprobs_RV: float64[R, V], nats; row r predicts response token r.
        spec: Which labels.
        finish_reason: How a response that the request does not know ended.
        stop_reason: The stop string that ended it, if one did.
    """
    response_R = response_R.astype(np.int32)
    mask_R = request.label_mask_R
    positions_N = np.arange(len(response_R)) if mask_R is None else np.flatnonzero(mask_R)
    logprobs_NV = logprobs_RV[positions_N]
    live_NV = logprobs_NV[:, : spec.vocab_size]
    order_NK = np.argsort(-live_NV, axis=1, kind="stable")[:, : spec.kind.width]
    top_NK = np.take_along_axis(live_NV, order_NK, 1).astype(np.float32)
    kept_NK = np.arange(order_NK.shape[1]) < label_kind(spec.kind).head_sizes(top_NK)[:, None]
    ids_NK = np.where(kept_NK, order_NK, UNUSED_ID).astype(np.int32)
    probabilities_NV = np.exp(logprobs_NV)
    rest_NV = probabilities_NV.copy()
    for rest_V, ids_K in zip(rest_NV, ids_NK, strict=True):
        rest_V[ids_K[ids_K != UNUSED_ID]] = 0.0
    token_N1 = np.take_along_axis(live_NV, response_R[positions_N, None].astype(np.int64), 1)
    optional: dict[str, npt.NDArray[Any]] = {
        name: scalar_column(name, logprobs_NV).astype(np.float32)
        for name in scalar_columns(spec.columns)
    }
    if spec.tail_samples is not None:
        uniforms_NM = tail_uniforms(request.key, positions_N, uniforms_needed(spec.tail_samples))
        optional[TAIL_IDS], optional[TAIL_WEIGHTS] = draw_tail_samples(
            spec.tail_samples, probabilities_NV, ids_NK, uniforms_NM, vocab_size=spec.vocab_size
        )
    known = request.response_ids_R is not None
    return LabelledSample(
        key=request.key,
        sample_index=request.sample_index,
        prompt_ids_P=request.prompt_ids_P,
        response_ids_R=response_R,
        positions_N=positions_N.astype(np.int32),
        token_logprob_N=token_N1[:, 0].astype(np.float32),
        token_rank_N=(1 + (live_NV > token_N1).sum(axis=1)).astype(np.int32),
        log_tail_mass_N=np.log(np.maximum(rest_NV.sum(axis=1), np.exp(LOG_ZERO))).astype(
            np.float32
        ),
        topk_ids_NK=ids_NK,
        topk_logprobs_NK=np.where(kept_NK, top_NK, np.float32(-np.inf)),
        optional=optional,
        finish_reason=request.finish_reason if known else finish_reason,
        stop_reason=request.stop_reason if known else stop_reason,
    )
