"""The start-up self-test: labels of three tokens against vLLM's public log-probs of all tokens.

The public rows are summed up by the plain arithmetic of ``storage/dense.py``, which every backend
has to agree with.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from storage.dense import label_sample_densely
from storage.errors import BadLabelError
from storage.keys import LabelSetSpec, sample_key
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.backends.vllm_capture import ArrayRows
from teacher_server.backends.vllm_samples import EngineRows, engine_rows, joined
from teacher_server.errors import CaptureError

PROBE_TOKENS = 3

TOLERANCE_NATS = 1e-3
"""Allowed difference: both sides sum the same float32 logits up."""

TAIL_TOLERANCE = 1e-4
"""Probability, not nats: a tail derived from the top-k cancels when it is small."""

RANK_TOLERANCE = 0.01
"""Share of a rank: float32 log-probs may tie where logits do not."""


def probe_request(spec: LabelSetSpec) -> SampleRequest:
    """A prompt of one token and a given response of a few, so that all its rows are labelled."""
    prompt_P = np.array([0], dtype=np.int32)
    response_R = (np.arange(1, 1 + PROBE_TOKENS) % spec.vocab_size).astype(np.int32)
    given = response_R if spec.generation.mode == "score" else None
    key = sample_key(prompt_P, 0, response_ids=given)
    return SampleRequest(key, 0, prompt_P, response_R, ())


def dense_labels(request: SampleRequest, rows: EngineRows, spec: LabelSetSpec) -> LabelledSample:
    """The labels of the probe from public rows that list the whole vocabulary."""
    ids_RV = rows.ids_NC[:, 1:]
    logprobs_RV = np.empty(ids_RV.shape, dtype=np.float64)
    np.put_along_axis(logprobs_RV, ids_RV, rows.numbers_NC[:, 1:].astype(np.float64), axis=1)
    assert request.response_ids_R is not None
    return label_sample_densely(request, request.response_ids_R, logprobs_RV, spec)


def require_equal_arrays(output: Any) -> None:
    """Refuse arrays that are not, bit for bit, the flat log-probs collected beside them.

    Raises:
        CaptureError: naming what differs.
    """
    for found in (output.outputs[0].logprobs, output.prompt_logprobs):
        if not isinstance(found, ArrayRows):
            raise CaptureError("the front end of vLLM did not keep arrays")
        arrays, flat = engine_rows(found), engine_rows(found.flat)
        for name in ("ids_NC", "numbers_NC", "ranks_N"):
            if not np.array_equal(getattr(arrays, name), getattr(flat, name), equal_nan=False):
                raise CaptureError(f"{name} of the arrays and of vLLM's flat log-probs differ")


def public_rows(output: Any) -> EngineRows:
    """All rows of the public request."""
    return joined([engine_rows(output.prompt_logprobs), engine_rows(output.outputs[0].logprobs)])


def require_same_labels(
    found: LabelledSample, dense: LabelledSample, spec: LabelSetSpec, *, rank_slack: int
) -> None:
    """Refuse labels that are not those of the public rows.

    Args:
        found: Labels of the probe, captured as those of every sample.
        dense: Labels of the probe from public rows.
        spec: Which labels.
        rank_slack: How far ranks may be off.

    Raises:
        CaptureError: naming the columns that differ and by how much.
    """
    try:
        found.check(spec)
    except BadLabelError as error:
        raise CaptureError(f"the labels of the self-test break an invariant: {error}") from error
    pairs = {
        "top-k log-probs": (found.topk_logprobs_NK, dense.topk_logprobs_NK),
        "token log-probs": (found.token_logprob_N, dense.token_logprob_N),
    } | {
        name: (values, dense.optional[name])
        for name, values in found.optional.items()
        if values.ndim == 1
    }
    worst = {name: _difference(*pair) for name, pair in pairs.items()}
    problems = [f"{name} by {d:.2g} nats" for name, d in worst.items() if not d <= TOLERANCE_NATS]
    tail = _difference(np.exp(found.log_tail_mass_N), np.exp(dense.log_tail_mass_N))
    if not tail <= TAIL_TOLERANCE:
        problems.append(f"tail mass by {tail:.2g}")
    ranks, dense_ranks = found.token_rank_N, dense.token_rank_N
    if (np.abs(ranks - dense_ranks) > 1 + rank_slack + RANK_TOLERANCE * dense_ranks).any():
        problems.append(f"ranks {ranks.tolist()} instead of {dense_ranks.tolist()}")
    if problems:
        raise CaptureError(f"labels differ from vLLM's public log-probs: {'; '.join(problems)}")


def _difference(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Largest difference of two arrays; infinities must stand at the same places."""
    if one.shape != other.shape or not np.array_equal(np.isinf(one), np.isinf(other)):
        return float("inf")
    finite = np.isfinite(one)
    return float(np.abs(one[finite] - other[finite]).max(initial=0.0))
