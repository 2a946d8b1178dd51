"""Another label set's labels of the same tokens, and how far they are from the first ones.

Shape legend: N labelled positions, K and J stored tokens of the two sets.
"""

from collections.abc import Mapping

import numpy as np

from pipeline.inspection.record import Floats, Prediction, of_labels
from storage.errors import LabelStoreError
from storage.keys import sample_key
from storage.label_set import LabelSet
from storage.labels.base import UNUSED_ID
from storage.samples import LabelledSample
from storage.tail import LOG_ZERO, logsumexp

ROWS = 256
"""Rows whose ids are compared at a time: K x J comparisons for each."""


def same_tokens(sample: LabelledSample, other: LabelSet) -> LabelledSample:
    """The sample of another set that has the same tokens at the same labelled positions.

    It has the same key, or the key that a set of mode ``score`` gives to these tokens.

    Raises:
        LabelStoreError: if there is none.
    """
    scored = sample_key(
        sample.prompt_ids_P,
        sample.sample_index,
        response_ids=sample.response_ids_R,
        label_mask=sample.label_mask_R,
    )
    known = [key for key in dict.fromkeys((sample.key, scored)) if other.contains([key])[0]]
    for found in other.read(known):
        if np.array_equal(found.response_ids_R, sample.response_ids_R) and np.array_equal(
            found.positions_N, sample.positions_N
        ):
            return found
    why = "its response has other tokens" if known else "it does not hold the sample"
    raise LabelStoreError(
        f"label set {other.key} cannot be compared on sample {sample.key}: {why}; score these "
        "responses with the other teacher (label.mode: score)"
    )


def of_other_labels(sample: LabelledSample, other: LabelledSample, name: str) -> Prediction:
    """What the labels of another set say of the same tokens, with the KL to the first labels."""
    found = of_labels(other, name)
    values: Mapping[str, Floats] = {**found.values, "kl": stored_kl(sample, other)}
    return Prediction(name, "labels", values, found.topk_ids_NK, found.topk_logprobs_NK)


def stored_kl(sample: LabelledSample, other: LabelledSample) -> Floats:
    """float64[N]: KL in nats of the tokens that both sets stored, the rest as one category.

    Joining categories never makes a divergence larger, so this is a lower bound of the KL over the
    vocabulary; it is exact where both stored the same tokens and have no tail.
    """
    parts = [
        _kl(*_rows(sample, slice(start, start + ROWS)), *_rows(other, slice(start, start + ROWS)))
        for start in range(0, len(sample.positions_N), ROWS)
    ]
    return np.concatenate(parts)


def _rows(sample: LabelledSample, rows: slice) -> tuple[np.ndarray, Floats]:
    """Ids, and the K+1 log-probs of tokens and tail; unused and empty ones are -inf."""
    log_tail_N = sample.log_tail_mass_N[rows].astype(np.float64)
    log_tail_N = np.where(log_tail_N <= LOG_ZERO, -np.inf, log_tail_N)
    logprobs_NK = sample.topk_logprobs_NK[rows].astype(np.float64)
    return sample.topk_ids_NK[rows], np.concatenate([logprobs_NK, log_tail_N[:, None]], axis=1)


def _kl(ids_NK: np.ndarray, p_NK: Floats, ids_NJ: np.ndarray, q_NJ: Floats) -> Floats:
    same_NKJ = (ids_NK[:, :, None] == ids_NJ[:, None, :]) & (ids_NK != UNUSED_ID)[:, :, None]
    shared_NK, place_NK = same_NKJ.any(axis=2), same_NKJ.argmax(axis=2)
    q_NK = np.where(shared_NK, np.take_along_axis(q_NJ[:, :-1], place_NK, axis=1), -np.inf)
    p_rest_N = _rest(p_NK, shared_NK)
    q_rest_N = _rest(q_NJ, same_NKJ.any(axis=1))
    p = np.concatenate([np.where(shared_NK, p_NK[:, :-1], -np.inf), p_rest_N[:, None]], axis=1)
    q = np.concatenate([q_NK, q_rest_N[:, None]], axis=1)
    return divergence(p, q)


def _rest(logprobs_NK: Floats, shared_NK: np.ndarray) -> Floats:
    """Log mass of the tail and of what is not shared, float64[N], at least LOG_ZERO."""
    tail_N1 = logprobs_NK[:, -1:]
    rest = np.concatenate([np.where(shared_NK, -np.inf, logprobs_NK[:, :-1]), tail_N1], axis=1)
    masses: Floats = logsumexp(np.maximum(rest, LOG_ZERO)).astype(np.float64)
    return masses


def divergence(p_NC: Floats, q_NC: Floats) -> Floats:
    """float64[N]: KL of categories in nats; both are normalised, which rounding has upset.

    Args:
        p_NC: float64[N, C], log-probs; -inf has no part in the sum.
        q_NC: float64[N, C], log-probs; at least LOG_ZERO counts.
    """
    with np.errstate(invalid="ignore"):
        p_NC = p_NC - logsumexp(np.maximum(p_NC, 2 * LOG_ZERO))[:, None]
        q_NC = np.maximum(q_NC - logsumexp(np.maximum(q_NC, 2 * LOG_ZERO))[:, None], LOG_ZERO)
        terms_NC = np.where(p_NC > LOG_ZERO, np.exp(p_NC) * (p_NC - q_NC), 0.0)
    total: Floats = np.maximum(terms_NC.sum(axis=1), 0.0)
    return total
