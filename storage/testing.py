"""Deterministic labels for tests of every layer: no model, real distributions over a vocabulary."""

import numpy as np

from storage.keys import (
    GenerationSpec,
    LabelSetSpec,
    SamplingSpec,
    TeacherFingerprint,
    TopKSpec,
    sample_key,
)
from storage.samples import LabelledSample
from storage.selection import SampleRequest


def make_spec(*, k: int = 8, vocab_size: int = 100, seed: int = 0) -> LabelSetSpec:
    """A label set spec as a small teacher would have it."""
    return LabelSetSpec(
        generation=GenerationSpec(
            teacher=TeacherFingerprint(weights="w" * 32, config="c" * 32),
            mode="generate",
            compute_dtype="float32",
            head_dtype="float32",
            sampling=SamplingSpec(
                temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=16, stop=(), seed=seed
            ),
        ),
        kind=TopKSpec(k=k),
        columns=("entropy",),
        tail="exact",
        vocab_size=vocab_size,
    )


def make_sample(number: int, spec: LabelSetSpec, *, num_tokens: int = 5) -> LabelledSample:
    """Sample ``number`` of a made-up teacher: random logits, response sampled from them."""
    random = np.random.default_rng(number)
    prompt_P = random.integers(0, spec.vocab_size, size=4 + number % 3).astype(np.int32)
    prompt_P[0] = number % spec.vocab_size
    logits_RV = random.normal(scale=2.0, size=(num_tokens, spec.vocab_size))
    logprobs_RV = logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True))
    response_R = np.array(
        [random.choice(spec.vocab_size, p=np.exp(row) / np.exp(row).sum()) for row in logprobs_RV],
        dtype=np.int32,
    )
    request = SampleRequest(sample_key(prompt_P, 0), 0, prompt_P, None, ())
    return label_sample_densely(request, response_R, logprobs_RV, spec)


def label_sample_densely(
    request: SampleRequest, response_R: np.ndarray, logprobs_RV: np.ndarray, spec: LabelSetSpec
) -> LabelledSample:
    """The labels of a response from dense log-probs float64[R, V]: the obvious way."""
    order_RV = np.argsort(-logprobs_RV, axis=1, kind="stable")
    ids_RK = order_RV[:, : spec.kind.width].astype(np.int32)
    rows = np.arange(len(response_R))
    token_logprob_R = logprobs_RV[rows, response_R]
    rest_R = np.exp(np.take_along_axis(logprobs_RV, order_RV[:, spec.kind.width :], 1)).sum(axis=1)
    return LabelledSample(
        key=request.key,
        sample_index=request.sample_index,
        prompt_ids_P=request.prompt_ids_P,
        response_ids_R=response_R,
        positions_N=rows.astype(np.int32),
        token_logprob_N=token_logprob_R.astype(np.float32),
        token_rank_N=(1 + (logprobs_RV > token_logprob_R[:, None]).sum(axis=1)).astype(np.int32),
        log_tail_mass_N=np.log(np.maximum(rest_R, 1e-40)).astype(np.float32),
        topk_ids_NK=ids_RK,
        topk_logprobs_NK=np.take_along_axis(logprobs_RV, ids_RK, 1).astype(np.float32),
        entropy_N=-(np.exp(logprobs_RV) * logprobs_RV).sum(axis=1).astype(np.float32),
        finish_reason="length" if request.response_ids_R is None else "given",
    )
