"""vLLM without the worker hook, short of memory, and with prompts cut in pieces."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.keys import (
    GenerationSpec,
    LabelSetSpec,
    MassSpec,
    SamplingSpec,
    TeacherFingerprint,
    TopKSpec,
    sample_key,
)
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.backends.base import TeacherBackend, TeacherJob, start_backend
from teacher_server.backends.vllm_engine import VllmBackend
from teacher_server.config import TransformersBackendConfig, VllmBackendConfig

VOCAB_SIZE = 260
FP32_NATS = 1e-4
CONTEXT = 128
MAX_TOKENS = 60
BLOCK_TOKENS = 32
"""Tokens of a block of the key-value cache."""


def make_spec(mode: str, **changes: Any) -> LabelSetSpec:
    sampling = SamplingSpec(
        temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=MAX_TOKENS, stop=(), seed=0
    )
    generation = GenerationSpec(
        teacher=TeacherFingerprint(weights="w", config="c"),
        mode=mode,
        compute_dtype="float32",
        head_dtype="float32",
        sampling=sampling if mode == "generate" else None,
    )
    spec = LabelSetSpec(
        generation=generation,
        kind=TopKSpec(k=16),
        columns=("entropy",),
        tail="exact",
        vocab_size=VOCAB_SIZE,
    )
    return spec.model_copy(update=changes)


def prompts(count: int) -> list[SampleRequest]:
    random = np.random.default_rng(1)
    ids = [random.integers(4, VOCAB_SIZE, size=8 + n).astype(np.int32) for n in range(count)]
    return [SampleRequest(sample_key(prompt, 0), 0, prompt, None, ()) for prompt in ids]


def conversations(count: int) -> list[SampleRequest]:
    """Given responses with masks: what the user and the tools said is not labelled."""
    random = np.random.default_rng(2)
    requests = []
    for number in range(count):
        prompt_P = random.integers(4, VOCAB_SIZE, size=5 + number).astype(np.int32)
        response_R = random.integers(4, VOCAB_SIZE, size=50 + number).astype(np.int32)
        mask_R = random.random(50 + number) < 0.6
        mask_R[0] = True
        key = sample_key(prompt_P, 0, response_ids=response_R, label_mask=mask_R)
        requests.append(SampleRequest(key, 0, prompt_P, response_R, (), label_mask_R=mask_R))
    return requests


class CrampedBackend(VllmBackend):
    """Room for three of eight responses: the others are preempted again and again."""

    def _engine_options(self, backend: VllmBackendConfig) -> dict[str, Any]:
        blocks = 3 * CONTEXT // BLOCK_TOKENS
        return super()._engine_options(backend) | {
            "num_gpu_blocks_override": blocks,
            "block_size": BLOCK_TOKENS,
        }


class ChoppingBackend(VllmBackend):
    """Prompts are read in pieces of at most 16 tokens."""

    def _engine_options(self, backend: VllmBackendConfig) -> dict[str, Any]:
        return super()._engine_options(backend) | {
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 16,
        }


@pytest.fixture
def start(tiny_teacher: Path) -> Iterator[Any]:
    """Start backends of some class, which are closed when the test is over."""
    started: list[TeacherBackend] = []

    def start_one(
        spec: LabelSetSpec, backend: type[VllmBackend] | None = None
    ) -> VllmBackend | TeacherBackend:
        reference = TransformersBackendConfig()
        config = VllmBackendConfig(max_num_seqs=8)
        job = TeacherJob(
            model=str(tiny_teacher),
            backend=reference if backend is None else config,
            spec=spec,
            max_model_len=CONTEXT,
        )
        started.append(start_backend(job) if backend is None else backend(job))
        return started[-1]

    yield start_one
    for one in started:
        one.close()


def answered(sample: LabelledSample) -> SampleRequest:
    return SampleRequest(sample.key, 0, sample.prompt_ids_P, sample.response_ids_R, ())


def assert_labels_of_transformers(
    found: list[LabelledSample], requests: list[SampleRequest], reference: TeacherBackend
) -> None:
    by_key = {sample.key: sample for sample in found}
    assert by_key.keys() == {request.key for request in requests}
    for expected in reference.label(requests):
        sample = by_key[expected.key]
        np.testing.assert_array_equal(sample.positions_N, expected.positions_N)
        np.testing.assert_array_equal(sample.topk_ids_NK, expected.topk_ids_NK)
        assert sample.optional.keys() == expected.optional.keys()
        for one, other in (
            (sample.topk_logprobs_NK, expected.topk_logprobs_NK),
            (sample.token_logprob_N, expected.token_logprob_N),
            (np.exp(sample.log_tail_mass_N), np.exp(expected.log_tail_mass_N)),
            *((sample.optional[name], values) for name, values in expected.optional.items()),
        ):
            np.testing.assert_allclose(one, other, atol=FP32_NATS)


def test_labels_without_the_worker_hook_say_so_and_are_right(start: Any) -> None:
    """Ids of the padding, a third of the model's rows, are left out of the public top-k."""
    spec = make_spec("generate", columns=(), tail="topk")
    teacher, reference = start(spec, VllmBackend), start(spec)
    facts = teacher.describe()
    assert (facts["capture"], facts["rows"]) == ("public", "arrays")
    generated = list(teacher.label(prompts(6)))
    asked = [*map(answered, generated), *conversations(4)]
    for sample in generated:
        sample.check(spec)
    assert_labels_of_transformers(generated, asked[:6], reference)
    assert_labels_of_transformers(list(teacher.label(asked)), asked, reference)


def test_preempted_responses_and_prompts_have_their_labels(start: Any) -> None:
    spec = make_spec("generate")
    teacher, reference = start(spec, CrampedBackend), start(spec)
    scheduler = teacher._llm.llm_engine.engine_core.engine_core.scheduler
    preempt, preempted = scheduler._preempt_request, []

    def counting(request: Any, *args: Any, **options: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **options)

    scheduler._preempt_request = counting
    generated = list(teacher.label(prompts(12)))
    assert preempted
    asked = list(map(answered, generated))
    for sample in generated:
        sample.check(spec)
    assert_labels_of_transformers(generated, asked, reference)
    asked += conversations(8)
    assert_labels_of_transformers(list(teacher.label(asked)), asked, reference)


def test_prompts_in_pieces_have_the_labels_of_their_mask(start: Any) -> None:
    spec = make_spec("score", kind=MassSpec(mass=0.8, cap=24))
    teacher, reference = start(spec, ChoppingBackend), start(spec)
    asked = conversations(10)
    found = list(teacher.label(asked))
    for sample in found:
        sample.check(spec)
        assert sample.finish_reason == "given"
    assert_labels_of_transformers(found, asked, reference)
