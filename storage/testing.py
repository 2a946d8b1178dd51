"""Deterministic labels for tests of every layer: no model, real distributions over a vocabulary."""

import numpy as np

from storage.certificate import Certificate
from storage.dense import label_sample_densely
from storage.keys import (
    ColumnSpec,
    GenerationSpec,
    LabelSetSpec,
    MassSpec,
    SamplingSpec,
    TeacherFingerprint,
    TopKSpec,
    sample_key,
)
from storage.label_set import LabelSet
from storage.qa import QaConfig
from storage.samples import LabelledSample
from storage.selection import SampleRequest

__all__ = ["label_sample_densely", "make_certificate", "make_sample", "make_spec"]


def make_spec(
    *,
    k: int = 8,
    vocab_size: int = 100,
    seed: int = 0,
    kind: TopKSpec | MassSpec | None = None,
    columns: tuple[ColumnSpec, ...] = ("entropy",),
) -> LabelSetSpec:
    """A label set spec as a small teacher would have it; ``kind`` replaces a fixed ``k``."""
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
        kind=kind or TopKSpec(k=k),
        columns=columns,
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


def make_certificate(label_set: LabelSet, number: int, *reasons: str) -> Certificate:
    """A certificate that nobody measured; reasons make it unfit."""
    return Certificate(
        label_set=label_set.key,
        number=number,
        commit=1,
        num_samples=9,
        verdict="unfit" if reasons else "fit",
        reasons=reasons,
        settings=QaConfig(),
        agreement=None,
        drawing=None,
        coverage=None,
        created_at="2026-11-22T12:00:00+00:00",
        provenance={},
    )
