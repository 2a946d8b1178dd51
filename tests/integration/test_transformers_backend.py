"""Labels of the embedded reference, with a tokenizer, against a plain forward pass."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from storage.keys import LabelSetSpec, TeacherFingerprint, sample_key
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.store import LabelStore
from teacher_server.backends.base import TeacherBackend, TeacherJob, start_backend
from teacher_server.config import (
    LabelConfig,
    TeacherConfig,
    TransformersBackendConfig,
    label_set_spec,
)
from teacher_server.label import label_samples

VOCAB_SIZE = 260
"""Ids of the tiny tokenizer; the model's output layer has more rows."""
K = 16
NATS = 1e-4

Spec = Callable[..., LabelSetSpec]
Dense = Callable[[LabelledSample], np.ndarray]


def spec_of(**label: object) -> LabelSetSpec:
    sampling = {"max_tokens": 12} if label.get("mode", "generate") == "generate" else {}
    settings = {"kind": {"k": K}, "sampling": sampling, **label}
    return label_set_spec(
        TeacherConfig(model="unused", dtype="float32"),
        LabelConfig.model_validate(settings),
        fingerprint=TeacherFingerprint(weights="w", config="c"),
        vocab_size=VOCAB_SIZE,
        tokenizer="t",
    )


def start(teacher: Path, spec: LabelSetSpec) -> TeacherBackend:
    backend = TransformersBackendConfig()
    return start_backend(
        TeacherJob(model=str(teacher), backend=backend, spec=spec, max_model_len=64)
    )


def prompt(number: int) -> np.ndarray:
    return np.array([2, *range(40 + number, 50 + 2 * number), 0, 3], dtype=np.int32)


def generation(number: int, *, sample_index: int = 0) -> SampleRequest:
    key = sample_key(prompt(number), sample_index)
    return SampleRequest(key, sample_index, prompt(number), None, ())


def scoring(number: int, response: list[int], mask: list[bool] | None = None) -> SampleRequest:
    mask_R = None if mask is None else np.array(mask)
    response_R = np.array(response, dtype=np.int32)
    key = sample_key(prompt(number), 0, response_ids=response_R, label_mask=mask_R)
    return SampleRequest(key, 0, prompt(number), response_R, (), label_mask_R=mask_R)


@pytest.fixture(scope="module")
def dense(tiny_teacher: Path) -> Dense:
    """Log-probs float64[R, V] of a whole response, by one pass of the model as it is stored."""
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)

    def rows(sample: LabelledSample) -> np.ndarray:
        tokens = np.concatenate([sample.prompt_ids_P, sample.response_ids_R]).astype(np.int64)
        with torch.inference_mode():
            logits_TV = model(torch.from_numpy(tokens)[None]).logits[0]
        found: np.ndarray = logits_TV.double().log_softmax(dim=-1).numpy()
        return found[len(sample.prompt_ids_P) - 1 : -1]

    return rows


def test_power_sums_are_those_of_the_dense_distribution(tiny_teacher: Path, dense: Dense) -> None:
    """Scaled logits are what a temperature means; the stored numbers must give the same."""
    others = {"10": 10.0, "200": 0.5, "400": 0.25}
    spec = spec_of(columns=["entropy", "power_sums", *(f"power_sum_{name}" for name in others)])
    for sample in start(tiny_teacher, spec).label(map(generation, range(3))):
        sample.check(spec)
        logprobs_RV = dense(sample)
        for name, temperature in {"25": 4.0, "50": 2.0, "75": 4 / 3, **others}.items():
            exact_RV = torch.from_numpy(logprobs_RV / temperature).log_softmax(dim=-1).numpy()
            log_sum_R = sample.optional[f"log_power_sum_{name}"]
            from_stored = logprobs_RV / temperature - log_sum_R[:, None]
            np.testing.assert_allclose(from_stored, exact_RV, atol=NATS)
            if name not in others:
                mean_R = (np.exp(exact_RV) * logprobs_RV).sum(axis=1)
                np.testing.assert_allclose(
                    sample.optional[f"power_slope_{name}"], mean_R, atol=10 * NATS
                )


def test_a_mask_leaves_gaps_and_changes_no_row(tiny_teacher: Path, dense: Dense) -> None:
    """Several turns: what stands between two answers is context and never a label."""
    response = [70, 71, 72, 0, 3, 80, 81, 0]
    mask = [True, True, False, False, False, False, True, True]
    spec = spec_of(mode="score", columns=["entropy", "power_sums"])
    (sample,) = start(tiny_teacher, spec).label([scoring(1, response, mask)])
    sample.check(spec)
    assert sample.positions_N.tolist() == [0, 1, 6, 7]
    assert sample.label_mask_R.tolist() == mask
    assert sample.response_ids_R.tolist() == response
    rows_NV = dense(sample)[mask]
    tokens = np.array(response)[mask]
    np.testing.assert_allclose(sample.token_logprob_N, rows_NV[np.arange(4), tokens], atol=NATS)
    top_NK = -np.sort(-rows_NV[:, :VOCAB_SIZE], axis=1)[:, :K]
    np.testing.assert_allclose(sample.topk_logprobs_NK, top_NK, atol=NATS)
    entropy_N = -(np.exp(rows_NV) * rows_NV).sum(axis=1)
    np.testing.assert_allclose(sample.entropy_N, entropy_N, atol=NATS)


def test_heads_of_adaptive_k_reach_their_mass(tiny_teacher: Path, dense: Dense) -> None:
    spec = spec_of(kind={"type": "mass", "mass": 0.6, "cap": 24})
    lengths = set()
    for sample in start(tiny_teacher, spec).label(map(generation, range(4))):
        sample.check(spec)
        sorted_RV = -np.sort(-np.exp(dense(sample)[:, :VOCAB_SIZE]), axis=1)
        for n, row in enumerate(sorted_RV):
            head = int((sample.topk_ids_NK[n] >= 0).sum())
            expected = min(24, 1 + int((np.cumsum(row) < 0.6).sum()))
            assert head == expected
            tail = 1 - row[:head].sum()
            np.testing.assert_allclose(np.exp(sample.log_tail_mass_N[n]), tail, atol=NATS)
            lengths.add(head)
    assert len(lengths) > 2
    assert max(lengths) <= 24


@pytest.mark.parametrize(
    "sampled",
    [
        {"type": "stratified", "draws": 5},
        {"type": "threshold", "threshold": 0.01},
        {"type": "counts", "draws": 40},
    ],
    ids=lambda sampled: sampled["type"],
)
def test_tail_samples_of_an_answer_are_those_of_scoring_it(
    tiny_teacher: Path, sampled: dict[str, object]
) -> None:
    """One token at a time or at once, now or later: the random numbers belong to the position."""
    spec = spec_of(columns=["entropy", sampled])
    (answer,) = start(tiny_teacher, spec).label([generation(2)])
    answer.check(spec)
    request = replace(
        generation(2), response_ids_R=answer.response_ids_R, finish_reason=answer.finish_reason
    )
    (again,) = start(tiny_teacher, spec).label([request])
    again.check(spec)
    np.testing.assert_array_equal(again.optional["tail_ids"], answer.optional["tail_ids"])
    np.testing.assert_allclose(
        again.optional["tail_weights"], answer.optional["tail_weights"], atol=NATS
    )


def test_a_stored_answer_is_widened_with_its_key_and_its_end(
    tiny_teacher: Path, dense: Dense
) -> None:
    narrow = spec_of(columns=[])
    wide = spec_of(kind={"k": 64}, columns=["entropy", "power_sum_10"])
    requests = [generation(1, sample_index=index) for index in range(3)]
    answers = list(start(tiny_teacher, narrow).label(requests))
    assert len({tuple(answer.response_ids_R) for answer in answers}) == 3
    upgrades = [
        replace(
            request,
            response_ids_R=answer.response_ids_R,
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )
        for request, answer in zip(requests, answers, strict=True)
    ]
    for answer, found in zip(answers, start(tiny_teacher, wide).label(upgrades), strict=True):
        found.check(wide)
        assert (found.key, found.finish_reason) == (answer.key, answer.finish_reason)
        np.testing.assert_array_equal(found.response_ids_R, answer.response_ids_R)
        np.testing.assert_array_equal(found.topk_ids_NK[:, :K], answer.topk_ids_NK)
        expected = -np.sort(-dense(answer)[:, :VOCAB_SIZE], axis=1)[:, :64]
        np.testing.assert_allclose(found.topk_logprobs_NK, expected, atol=NATS)


# -- where an answer ends --------------------------------------------------------------------------
def test_an_answer_ends_at_the_token_that_completes_a_stop_string(tiny_teacher: Path) -> None:
    """Up to that token it is the answer that was given without the stop string."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    (whole,) = start(tiny_teacher, spec_of()).label([generation(3)])
    tokens = whole.response_ids_R.tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    # two characters in the middle that are complete: every byte is a token, not every byte a letter
    place = next(
        n for n in range(2, len(text)) if "\ufffd" not in text[n - 1 : n + 1] and text[n].isascii()
    )
    stop = text[place - 1 : place + 1]
    spec = spec_of(sampling={"max_tokens": 12, "stop": [stop, "never in the text"]})
    (stopped,) = start(tiny_teacher, spec).label([generation(3)])
    stopped.check(spec)
    length = next(
        n
        for n in range(1, len(tokens) + 1)
        if stop in tokenizer.decode(tokens[:n], skip_special_tokens=True)
    )
    assert stopped.response_ids_R.tolist() == tokens[:length]
    assert len(stopped.positions_N) == length
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    np.testing.assert_allclose(stopped.entropy_N, whole.entropy_N[:length], atol=NATS)


def test_the_end_token_of_the_tokenizer_ends_an_answer_too(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    """A generation config often names other end tokens than the tokenizer; both end an answer."""
    (whole,) = start(tiny_teacher, spec_of()).label([generation(0)])
    assert whole.finish_reason == "length"
    third = int(whole.response_ids_R[2])
    assert third not in whole.response_ids_R[:2]
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(third)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == 0
    (ended,) = start(tmp_path, spec_of()).label([generation(0)])
    assert ended.response_ids_R.tolist() == whole.response_ids_R[:3].tolist()
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)


# -- through the store -----------------------------------------------------------------------------
def test_labels_with_all_columns_survive_the_store(tiny_teacher: Path, tmp_path: Path) -> None:
    spec = spec_of(
        kind={"type": "mass", "mass": 0.7, "cap": 24},
        columns=["entropy", "power_sums", {"type": "threshold", "threshold": 0.02}],
    )
    label_set = LabelStore(str(tmp_path), create=True).create(spec, {})
    requests = [generation(number) for number in range(3)]
    backend = start(tiny_teacher, spec)
    *_, last = label_samples(backend, requests, label_set, commit_samples=2, provenance={})
    assert last.committed_samples == 3
    assert list(label_set.verify()) == []
    again = {sample.key: sample for sample in start(tiny_teacher, spec).label(requests)}
    for found in label_set.read([request.key for request in requests]):
        for name, values in again[found.key].optional.items():
            np.testing.assert_array_equal(found.optional[name], values)
