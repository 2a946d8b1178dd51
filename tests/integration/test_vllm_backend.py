"""Labels from the real vLLM engine on CPU, against transformers as the oracle."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from storage.columns import TAIL_IDS, TAIL_WEIGHTS, scalar_columns
from storage.keys import (
    ColumnSpec,
    GenerationSpec,
    LabelSetSpec,
    SamplingSpec,
    StratifiedSpec,
    TeacherFingerprint,
    TopKSpec,
    sample_key,
)
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from student_train.config import MODEL_DIRECTORY, LabelSource, TrainConfig, TrainJob
from student_train.models.export import export_student
from student_train.models.student import make_student
from teacher_server.backends import vllm_capture
from teacher_server.backends.base import TeacherJob, start_backend
from teacher_server.backends.vllm_capture import ArrayRows
from teacher_server.backends.vllm_engine import VllmBackend
from teacher_server.backends.vllm_rows import LabelRows, Summary
from teacher_server.config import TransformersBackendConfig, VllmBackendConfig
from teacher_server.errors import CaptureError

K = 16
VOCAB_SIZE = 260
"""Ids of the tiny tokenizer; the model's embedding has more rows."""
FP32_NATS = 1e-4
MAX_TOKENS = 12
CONTEXT = 64
MAX_NUM_SEQS = 8
COLUMNS: tuple[ColumnSpec, ...] = (
    "entropy",
    "power_sum_10",
    "power_sum_200",
    "power_sum_400",
    "power_sums",
    StratifiedSpec(draws=4),
)


def make_spec(
    *, temperature: float = 1.0, max_tokens: int = MAX_TOKENS, stop: tuple[str, ...] = ()
) -> LabelSetSpec:
    return LabelSetSpec(
        generation=GenerationSpec(
            teacher=TeacherFingerprint(weights="w", config="c"),
            mode="generate",
            compute_dtype="float32",
            head_dtype="float32",
            sampling=SamplingSpec(
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                max_tokens=max_tokens,
                stop=stop,
                seed=0,
            ),
        ),
        kind=TopKSpec(k=K),
        columns=COLUMNS,
        tail="exact",
        vocab_size=VOCAB_SIZE,
    )


def prompts(count: int) -> list[SampleRequest]:
    requests = []
    for number in range(count):
        ids = np.array([2, *range(40 + number, 50 + 2 * number), 0, 3], dtype=np.int32)
        requests.append(SampleRequest(sample_key(ids, 0), 0, ids, None, ()))
    return requests


def answered(sample: LabelledSample) -> SampleRequest:
    """Ask for more labels of a stored answer."""
    return SampleRequest(
        sample.key,
        sample.sample_index,
        sample.prompt_ids_P,
        sample.response_ids_R,
        (),
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
    )


@pytest.fixture(scope="module")
def exported(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher as a trained student is exported: what vLLM loads in this module, and
    compared with the labels of the original in transformers."""
    output = tmp_path_factory.mktemp("exported")
    train = TrainConfig(model=str(tiny_teacher), export_dtype="float32")
    job = TrainJob(
        labels=LabelSource(store="unused", label_set="a" * 32, selection="b" * 32),
        model=str(tiny_teacher),
        tokenizer=str(tiny_teacher),
        train=train,
        output=str(output),
    )
    student = make_student(job.model, train, VOCAB_SIZE)
    export_student(student.language_model, job, facts={})
    return output / MODEL_DIRECTORY


@pytest.fixture(scope="module")
def teacher(exported: Path) -> Iterator[VllmBackend]:
    backend = start_backend(
        TeacherJob(
            model=str(exported),
            # a few prompts fill one step: the others must wait, not be cut in pieces
            backend=VllmBackendConfig(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=1),
            spec=make_spec(),
            max_model_len=CONTEXT,
        )
    )
    assert isinstance(backend, VllmBackend)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def generated(teacher: VllmBackend) -> list[LabelledSample]:
    return sorted(teacher.label(prompts(12)), key=lambda sample: len(sample.prompt_ids_P))


@pytest.fixture(scope="module")
def reference(tiny_teacher: Path) -> Iterator[object]:
    backend = start_backend(
        TeacherJob(
            model=str(tiny_teacher),
            backend=TransformersBackendConfig(),
            spec=make_spec(),
            max_model_len=CONTEXT,
        )
    )
    yield backend
    backend.close()


def generate(
    teacher: VllmBackend, spec: LabelSetSpec, requests: list[SampleRequest]
) -> list[LabelledSample]:
    """Labels with other sampling than the engine was started for."""
    job = teacher._job
    teacher._job = job.model_copy(update={"spec": spec})
    try:
        return list(teacher.label(requests))
    finally:
        teacher._job = job


def test_both_hooks_passed_the_self_test(teacher: VllmBackend) -> None:
    facts = teacher.describe()
    assert (facts["capture"], facts["rows"]) == ("worker", "arrays")


def test_generated_labels_keep_every_invariant_of_the_format(
    generated: list[LabelledSample],
) -> None:
    assert len(generated) == 12
    for sample in generated:
        sample.check(make_spec())
        ended = sample.response_ids_R[-1] == 0  # the end token is part of the response
        assert sample.finish_reason == ("stop" if ended else "length")
        assert sample.stop_reason is None
        assert 0 not in sample.response_ids_R[:-1]
        assert ended or len(sample.response_ids_R) == MAX_TOKENS


def test_labels_equal_those_of_transformers_position_by_position(
    generated: list[LabelledSample], reference: VllmBackend
) -> None:
    """Row t is the distribution that predicted response token t, over the full vocabulary."""
    for sample in generated:
        (expected,) = reference.label([answered(sample)])
        assert_same_labels(sample, expected)


def test_scoring_a_stored_answer_gives_the_labels_of_generating_it(
    teacher: VllmBackend, generated: list[LabelledSample]
) -> None:
    scored = {sample.key: sample for sample in teacher.label(map(answered, generated))}
    for sample in generated:
        again = scored[sample.key]
        again.check(make_spec())
        assert again.finish_reason == sample.finish_reason
        assert_same_labels(again, sample)


def test_only_the_mask_of_a_response_is_labelled(
    teacher: VllmBackend, generated: list[LabelledSample]
) -> None:
    """The last token is scored in another way than the others: with it, without it, alone."""
    whole = generated[0]
    for positions in ([1, 4, 5], [0, 11], [11], [3]):
        mask_R = np.zeros(MAX_TOKENS, dtype=np.bool_)
        mask_R[positions] = True
        (sample,) = teacher.label([replace(answered(whole), label_mask_R=mask_R)])
        np.testing.assert_array_equal(sample.positions_N, positions)
        expected = replace(
            whole,
            positions_N=np.array(positions, dtype=np.int32),
            token_logprob_N=whole.token_logprob_N[positions],
            token_rank_N=whole.token_rank_N[positions],
            log_tail_mass_N=whole.log_tail_mass_N[positions],
            topk_ids_NK=whole.topk_ids_NK[positions],
            topk_logprobs_NK=whole.topk_logprobs_NK[positions],
            optional={name: values[positions] for name, values in whole.optional.items()},
        )
        assert_same_labels(sample, expected)


def test_a_response_of_one_token_is_scored(
    teacher: VllmBackend, generated: list[LabelledSample]
) -> None:
    short = replace(answered(generated[0]), response_ids_R=generated[0].response_ids_R[:1])
    (sample,) = teacher.label([short])
    np.testing.assert_allclose(
        sample.topk_logprobs_NK[0], generated[0].topk_logprobs_NK[0], atol=FP32_NATS
    )


def test_a_response_that_fills_the_context_is_scored(
    teacher: VllmBackend, reference: VllmBackend
) -> None:
    prompt_P = np.array([2, 40, 3], dtype=np.int32)
    response_R = np.arange(10, 10 + CONTEXT - 3, dtype=np.int32)
    request = SampleRequest(sample_key(prompt_P, 0), 0, prompt_P, response_R, ())
    (sample,) = teacher.label([request])
    (expected,) = reference.label([request])
    assert_same_labels(sample, expected)


def test_an_answer_that_fills_the_context_can_be_upgraded(teacher: VllmBackend) -> None:
    prompt_P = np.arange(40, 40 + CONTEXT - 4, dtype=np.int32)
    request = SampleRequest(sample_key(prompt_P, 0), 0, prompt_P, None, ())
    (sample,) = generate(teacher, make_spec(max_tokens=99), [request])
    assert (len(sample.response_ids_R), sample.finish_reason) == (4, "length")
    (scored,) = teacher.label([answered(sample)])
    assert_same_labels(scored, sample)


def test_flat_log_probs_give_the_same_labels_bit_for_bit(
    teacher: VllmBackend, generated: list[LabelledSample]
) -> None:
    """What happens when the front end does not take the hook."""
    vllm_capture.forget_arrays()
    try:
        flat = {sample.key: sample for sample in teacher.label(prompts(12))}
        scored = list(teacher.label([answered(generated[0])]))
    finally:
        vllm_capture.keep_arrays()
    (again,) = teacher.label([answered(generated[0])])
    for one, other in [(flat[sample.key], sample) for sample in generated] + [(scored[0], again)]:
        assert one.finish_reason == other.finish_reason
        for name in LabelledSample.__dataclass_fields__:
            np.testing.assert_equal(getattr(one, name), getattr(other, name))


def test_a_response_depends_on_its_sample_alone(
    teacher: VllmBackend, generated: list[LabelledSample]
) -> None:
    """Another order and another batch: the seed comes from the sample key (fp32, tiny model)."""
    again = {s.key: s for s in teacher.label(reversed(prompts(5)))}
    for sample in generated[:5]:
        np.testing.assert_array_equal(again[sample.key].response_ids_R, sample.response_ids_R)


def test_prompts_wait_for_room_instead_of_being_cut_in_pieces(teacher: VllmBackend) -> None:
    """Pieces of a prompt whose request has a seed kill vLLM on CPU."""
    long = [
        SampleRequest(sample_key(ids, 0), 0, ids, None, ())
        for ids in (np.arange(n, n + CONTEXT - 4, dtype=np.int32) for n in range(MAX_NUM_SEQS))
    ]
    samples = list(teacher.label(long))
    assert {len(sample.response_ids_R) for sample in samples} <= {1, 2, 3, 4}
    for sample in samples:  # the context is full
        sample.check(make_spec())
        assert sample.finish_reason == ("stop" if sample.response_ids_R[-1] == 0 else "length")


def test_a_stop_string_ends_a_response_and_its_tokens_are_kept(
    teacher: VllmBackend, generated: list[LabelledSample]
) -> None:
    """A token of the tiny tokenizer is a byte; the strings are what the teacher said before."""
    tokenizer = teacher._llm.get_tokenizer()
    for sample in generated:
        texts = [tokenizer.decode([token]) for token in sample.response_ids_R]
        place = next(n for n in range(2, MAX_TOKENS) if texts[n].isascii())
        length = 1 + texts.index(texts[place])
        spec = make_spec(stop=("never said", texts[place]))
        (stopped,) = generate(teacher, spec, [replace(answered(sample), response_ids_R=None)])
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", texts[place])
        np.testing.assert_array_equal(stopped.response_ids_R, sample.response_ids_R[:length])
        np.testing.assert_array_equal(stopped.topk_ids_NK, sample.topk_ids_NK[:length])
        stopped.check(spec)


def test_a_response_may_end_at_once(teacher: VllmBackend) -> None:
    """One in some hundred prompts of random bytes is answered by the end token."""
    spec = make_spec(temperature=2.0, max_tokens=1)
    random = np.random.default_rng(0)
    ids = [random.integers(4, VOCAB_SIZE, size=4).astype(np.int32) for _ in range(1200)]
    asked = [SampleRequest(sample_key(prompt, 0), 0, prompt, None, ()) for prompt in ids]
    at_once = [s for s in generate(teacher, spec, asked) if s.finish_reason == "stop"]
    assert at_once
    for sample in at_once:
        assert sample.response_ids_R.tolist() == [0]
        sample.check(spec)


def test_tokens_through_the_teacher_are_counted(
    teacher: VllmBackend, generated: list[LabelledSample]
) -> None:
    before = teacher.forward_tokens
    (sample,) = teacher.label(prompts(1))
    spent = teacher.forward_tokens - before
    assert spent == len(sample.prompt_ids_P) + len(sample.response_ids_R)


def test_a_caller_that_gives_up_leaves_the_engine_empty(
    teacher: VllmBackend, generated: list[LabelledSample]
) -> None:
    samples = teacher.label(prompts(12))
    next(samples)
    samples.close()
    assert not teacher._llm.llm_engine.has_unfinished_requests()
    (again,) = teacher.label(prompts(1))
    np.testing.assert_array_equal(again.response_ids_R, generated[0].response_ids_R)


def test_rows_of_other_tokens_are_refused_by_the_name_of_their_sample(
    teacher: VllmBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that mixes up the rows of its requests."""
    sampler = teacher._llm.llm_engine.model_executor.driver_worker.worker.model_runner.sampler
    gather = sampler.gather_logprobs

    def rotated(logprobs_NV: object, num_logprobs: int, token_ids: object) -> object:
        found = gather(logprobs_NV, num_logprobs, token_ids)
        return type(found)(*(columns.roll(1, dims=0) for columns in found[:3]))

    monkeypatch.setattr(sampler, "gather_logprobs", rotated)
    with pytest.raises(CaptureError, match=r"sample [0-9a-f]{32}: row \d+ is that of token"):
        list(teacher.label(prompts(3)))


def test_labels_that_fail_the_self_test_are_refused_with_a_way_out(
    teacher: VllmBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose sums leave out half of the vocabulary."""
    summarize = LabelRows.summarize

    def halved(self: LabelRows, logits_NV: Tensor, logprobs_NV: Tensor) -> Summary:
        logits_NV = logits_NV.clone()
        logits_NV[:, 100:] = -torch.inf
        return summarize(self, logits_NV, logprobs_NV)

    runner = teacher._llm.llm_engine.model_executor.driver_worker.worker.model_runner
    for owner, name in (
        (runner.sampler, "compute_logprobs"),
        (runner.sampler, "gather_logprobs"),
        (runner, "_get_prompt_logprobs_dict"),
    ):
        delattr(owner, name)  # as in an engine that was just started
    with monkeypatch.context() as patch:
        patch.setattr(LabelRows, "summarize", halved)
        with pytest.raises(CaptureError, match=r"self-test.*label\.tail: topk.*columns: \[\]"):
            teacher._start_capture()
    teacher._start_capture()


def test_a_front_end_that_does_not_fit_is_left_as_it_was(
    teacher: VllmBackend, generated: list[LabelledSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays that change a number, and arrays that cannot be made at all."""

    def lossy(self: ArrayRows, ids: np.ndarray, numbers: np.ndarray, ranks: np.ndarray) -> None:
        append(self, ids, np.nextafter(numbers, 0), ranks)

    def impossible(self: ArrayRows, *columns: np.ndarray) -> None:
        raise TypeError("rows have another form")

    append = ArrayRows.append
    for broken in (lossy, impossible):
        with monkeypatch.context() as patch:
            patch.setattr(ArrayRows, "append", broken)
            teacher._start_capture()
            assert teacher.describe()["rows"] == "flat"
            (sample,) = teacher.label(prompts(1))
        assert_same_labels(sample, generated[0])
    teacher._start_capture()
    assert teacher.describe()["rows"] == "arrays"


def assert_same_labels(one: LabelledSample, other: LabelledSample) -> None:
    np.testing.assert_array_equal(one.response_ids_R, other.response_ids_R)
    np.testing.assert_array_equal(one.topk_ids_NK, other.topk_ids_NK)
    np.testing.assert_array_equal(one.token_rank_N, other.token_rank_N)
    for left, right in (
        (one.topk_logprobs_NK, other.topk_logprobs_NK),
        (one.token_logprob_N, other.token_logprob_N),
        (one.log_tail_mass_N, other.log_tail_mass_N),
        *((one.optional[name], other.optional[name]) for name in scalar_columns(COLUMNS)),
    ):
        np.testing.assert_allclose(left, right, atol=FP32_NATS)
    assert_same_tail_samples(one, other)


def assert_same_tail_samples(one: LabelledSample, other: LabelledSample) -> None:
    """The same random numbers; rounding may move a draw that falls between two tokens."""
    same = total = 0
    for left, right in zip(one.optional[TAIL_IDS], other.optional[TAIL_IDS], strict=True):
        same += len(np.intersect1d(left[left >= 0], right[right >= 0]))
        total += max((left >= 0).sum(), (right >= 0).sum())
    assert same >= 0.9 * total
    np.testing.assert_allclose(
        one.optional[TAIL_WEIGHTS].sum(axis=1),
        other.optional[TAIL_WEIGHTS].sum(axis=1),
        atol=FP32_NATS,
    )
