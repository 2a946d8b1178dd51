"""Labels from the real vLLM engine on CPU, against transformers as the oracle."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from storage.keys import LabelSetSpec, TeacherFingerprint, sample_key
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.backends.base import TeacherBackend, TeacherJob, start_backend
from teacher_server.config import (
    LabelConfig,
    SamplingConfig,
    TeacherConfig,
    TransformersBackendConfig,
    VllmBackendConfig,
    label_set_spec,
)

K = 16
VOCAB_SIZE = 260
"""Ids of the tiny tokenizer; the model's embedding has more rows."""
FP32_NATS = 1e-4
MAX_TOKENS = 12


def spec_for(mode: str) -> LabelSetSpec:
    sampling = SamplingConfig(max_tokens=MAX_TOKENS) if mode == "generate" else SamplingConfig()
    return label_set_spec(
        TeacherConfig(model="unused", dtype="float32"),
        LabelConfig(mode=mode, sampling=sampling, kind={"k": K}),
        fingerprint=TeacherFingerprint(weights="w", config="c"),
        vocab_size=VOCAB_SIZE,
        tokenizer="t",
    )


def job_for(model: Path, mode: str, backend: str) -> TeacherJob:
    chosen = VllmBackendConfig(max_num_seqs=8) if backend == "vllm" else TransformersBackendConfig()
    return TeacherJob(model=str(model), backend=chosen, spec=spec_for(mode), max_model_len=64)


def prompts(count: int) -> list[SampleRequest]:
    requests = []
    for number in range(count):
        ids = np.array([2, *range(40 + number, 50 + 2 * number), 0, 3], dtype=np.int32)
        requests.append(SampleRequest(sample_key(ids, 0), 0, ids, None, ()))
    return requests


def as_scoring(sample: LabelledSample) -> SampleRequest:
    ids, response = sample.prompt_ids_P, sample.response_ids_R
    return SampleRequest(sample_key(ids, 0, response_ids=response), 0, ids, response, ())


@pytest.fixture(scope="module")
def vllm_teacher(tiny_teacher: Path) -> Iterator[TeacherBackend]:
    backend = start_backend(job_for(tiny_teacher, "generate", "vllm"))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def generated(vllm_teacher: TeacherBackend) -> list[LabelledSample]:
    return sorted(vllm_teacher.label(prompts(12)), key=lambda sample: len(sample.prompt_ids_P))


def test_generated_labels_keep_every_invariant_of_the_format(
    generated: list[LabelledSample],
) -> None:
    assert len(generated) == 12
    for sample in generated:
        sample.check(spec_for("generate"))
        ended = sample.response_ids_R[-1] == 0  # the end token is part of the response
        assert sample.finish_reason == ("stop" if ended else "length")
        assert 0 not in sample.response_ids_R[:-1]
        assert ended or len(sample.response_ids_R) == MAX_TOKENS


def test_labels_equal_those_of_transformers_position_by_position(
    generated: list[LabelledSample], tiny_teacher: Path
) -> None:
    """Row t is the distribution that predicted response token t, over the full vocabulary."""
    reference = start_backend(job_for(tiny_teacher, "score", "transformers"))
    for sample in generated:
        (expected,) = reference.label([as_scoring(sample)])
        assert_same_labels(sample, expected)


def test_scoring_a_response_gives_the_labels_of_generating_it(
    vllm_teacher: TeacherBackend, generated: list[LabelledSample]
) -> None:
    generating_job = vllm_teacher._job
    try:
        vllm_teacher._job = generating_job.model_copy(update={"spec": spec_for("score")})
        scored = {s.key: s for s in vllm_teacher.label(map(as_scoring, generated))}
    finally:
        vllm_teacher._job = generating_job
    for sample in generated:
        again = scored[as_scoring(sample).key]
        again.check(spec_for("score"))
        assert_same_labels(again, sample)


def test_a_response_depends_on_its_sample_alone(
    vllm_teacher: TeacherBackend, generated: list[LabelledSample]
) -> None:
    """Another order and another batch: the seed comes from the sample key (fp32, tiny model)."""
    again = {s.key: s for s in vllm_teacher.label(reversed(prompts(5)))}
    for sample in generated[:5]:
        np.testing.assert_array_equal(again[sample.key].response_ids_R, sample.response_ids_R)


def test_tokens_through_the_teacher_are_counted(
    vllm_teacher: TeacherBackend, generated: list[LabelledSample]
) -> None:
    before = vllm_teacher.forward_tokens
    (sample,) = vllm_teacher.label(prompts(1))
    spent = vllm_teacher.forward_tokens - before
    assert spent == len(sample.prompt_ids_P) + len(sample.response_ids_R)


def assert_same_labels(one: LabelledSample, other: LabelledSample) -> None:
    np.testing.assert_array_equal(one.response_ids_R, other.response_ids_R)
    np.testing.assert_array_equal(one.topk_ids_NK, other.topk_ids_NK)
    np.testing.assert_array_equal(one.token_rank_N, other.token_rank_N)
    assert one.entropy_N is not None
    assert other.entropy_N is not None
    for left, right in (
        (one.topk_logprobs_NK, other.topk_logprobs_NK),
        (one.token_logprob_N, other.token_logprob_N),
        (one.log_tail_mass_N, other.log_tail_mass_N),
        (one.entropy_N, other.entropy_N),
    ):
        np.testing.assert_allclose(left, right, atol=FP32_NATS)
