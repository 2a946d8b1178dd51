"""Scoring again: every number against float64 arithmetic over a plain forward pass."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from storage.agreement import DenseRows
from storage.dense import entropy
from storage.keys import CountsSpec, LabelSetSpec, MassSpec
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.backends.base import TeacherJob
from teacher_server.backends.transformers_reference import TransformersBackend
from teacher_server.config import TransformersBackendConfig
from teacher_server.rescore import CHUNK_ROWS, start_rescorer

MakeSpec = Callable[..., LabelSetSpec]
MakeRequest = Callable[..., SampleRequest]
VOCAB_SIZE, K = 40, 4
PROMPT = [3, 17, 5]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A backend sets the threads of its process; here the process is everybody's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def labelled(
    teacher: Path, spec: LabelSetSpec, request: SampleRequest, *, max_model_len: int = 64
) -> LabelledSample:
    backend = TransformersBackend(
        TeacherJob(
            model=str(teacher),
            backend=TransformersBackendConfig(),
            spec=spec,
            max_model_len=max_model_len,
        )
    )
    (sample,) = backend.label([request])
    return sample


def dense(teacher: Path, sample: LabelledSample) -> np.ndarray:
    """Log-probs float64[R, V] over all rows of the output layer."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tokens = np.concatenate([sample.prompt_ids_P, sample.response_ids_R]).astype(np.int64)
    with torch.inference_mode():
        logits_TV = model(torch.from_numpy(tokens)[None]).logits[0]
    rows_RV: np.ndarray = logits_TV.double().log_softmax(-1)[len(sample.prompt_ids_P) - 1 : -1]
    return np.asarray(rows_RV)


def score(
    teacher: Path, spec: LabelSetSpec, sample: LabelledSample, *heads: np.ndarray
) -> DenseRows:
    rescorer = start_rescorer(str(teacher), spec, threads=1, exact=True)
    try:
        return rescorer.score(sample, heads)
    finally:
        rescorer.close()


@pytest.fixture
def generated(tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest) -> LabelledSample:
    return labelled(tiny_teacher, make_spec(k=K, max_tokens=12), make_request(PROMPT))


def test_every_number_equals_the_dense_computation(
    tiny_teacher: Path, make_spec: MakeSpec, generated: LabelledSample
) -> None:
    """For the ids that are stored, right or wrong."""
    wrong_NK = (generated.topk_ids_NK + 7) % VOCAB_SIZE
    stored = replace(generated, topk_ids_NK=wrong_NK, token_rank_N=generated.token_rank_N + 3)
    found = score(tiny_teacher, make_spec(k=K), stored)
    rows_RV = dense(tiny_teacher, generated)
    live_RV = rows_RV[:, :VOCAB_SIZE]
    expected_NK = np.take_along_axis(live_RV, wrong_NK.astype(np.int64), 1)
    np.testing.assert_allclose(found.logprobs_NK, expected_NK, atol=1e-5)
    tail_N = np.log1p(-np.exp(expected_NK).sum(axis=1))
    np.testing.assert_allclose(found.log_tail_mass_N, tail_N, atol=1e-5)
    token_N = live_RV[np.arange(len(live_RV)), generated.token_ids_N]
    np.testing.assert_allclose(found.token_logprob_N, token_N, atol=1e-5)
    np.testing.assert_allclose(found.scalars["entropy"], entropy(rows_RV), atol=1e-5)
    np.testing.assert_array_equal(found.top_ids_NK, np.argsort(-live_RV, axis=1)[:, :K])
    padding_N = np.exp(rows_RV[:, VOCAB_SIZE:]).sum(axis=1)
    np.testing.assert_allclose(found.padding_mass_N, padding_N, atol=1e-6)
    ranked_RV = -np.sort(-live_RV, axis=1)
    there_N = ranked_RV[np.arange(len(live_RV)), np.minimum(stored.token_rank_N, VOCAB_SIZE) - 1]
    np.testing.assert_allclose(found.rank_gap_N, np.abs(there_N - token_N), atol=1e-5)
    for row, ids_K in enumerate(wrong_NK):
        outside = np.delete(live_RV[row], ids_K).max()
        gap = max(0.0, outside - live_RV[row, ids_K].min())
        assert found.head_gaps[0][row] == pytest.approx(gap, abs=1e-5)


def test_correct_labels_are_found_again(
    tiny_teacher: Path, make_spec: MakeSpec, generated: LabelledSample
) -> None:
    found = score(tiny_teacher, make_spec(k=K), generated, generated.topk_ids_NK[:, ::-1])
    np.testing.assert_allclose(found.logprobs_NK, generated.topk_logprobs_NK, atol=1e-5)
    np.testing.assert_allclose(found.log_tail_mass_N, generated.log_tail_mass_N, atol=1e-5)
    assert found.rank_gap_N.max() < 1e-5
    assert [gap_N.max() for gap_N in found.head_gaps] == [0.0, 0.0]


def test_a_long_response_is_scored_in_pieces(
    tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    long = CHUNK_ROWS + 5
    spec = make_spec(k=K, mode="score")
    response = np.random.default_rng(0).integers(2, VOCAB_SIZE, size=long).tolist()
    sample = labelled(tiny_teacher, spec, make_request(PROMPT, response), max_model_len=99)
    found = score(tiny_teacher, spec, sample)
    assert len(found.logprobs_NK) == long
    np.testing.assert_allclose(found.logprobs_NK, sample.topk_logprobs_NK, atol=1e-5)


def test_positions_without_label_are_left_out(
    tiny_teacher: Path, make_spec: MakeSpec, generated: LabelledSample
) -> None:
    every_third = slice(None, None, 3)
    masked = replace(
        generated,
        positions_N=generated.positions_N[every_third],
        topk_ids_NK=generated.topk_ids_NK[every_third],
        token_rank_N=generated.token_rank_N[every_third],
    )
    found = score(tiny_teacher, make_spec(k=K), masked)
    expected_NK = generated.topk_logprobs_NK[every_third]
    np.testing.assert_allclose(found.logprobs_NK, expected_NK, atol=1e-5)


def test_unused_entries_of_adaptive_heads_stay_unused(
    tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    spec = make_spec(max_tokens=12)
    spec = spec.model_copy(update={"kind": MassSpec(mass=0.8, cap=10)})
    sample = labelled(tiny_teacher, spec, make_request(PROMPT))
    assert (sample.topk_ids_NK == -1).any()
    found = score(tiny_teacher, spec, sample)
    np.testing.assert_array_equal(np.isneginf(found.logprobs_NK), sample.topk_ids_NK == -1)
    np.testing.assert_allclose(found.log_tail_mass_N, sample.log_tail_mass_N, atol=1e-5)
    assert found.head_gaps[0].max() == 0.0


def test_a_model_in_a_short_dtype_is_off_and_float32_is_not(
    tiny_teacher: Path, make_spec: MakeSpec, generated: LabelledSample
) -> None:
    spec = make_spec(k=K)
    generation = spec.generation.model_copy(update={"compute_dtype": "bfloat16"})
    spec = spec.model_copy(update={"generation": generation})
    rough = start_rescorer(str(tiny_teacher), spec, threads=1, exact=False).score(generated)
    exact = start_rescorer(str(tiny_teacher), spec, threads=1, exact=True).score(generated)
    assert np.abs(rough.logprobs_NK - generated.topk_logprobs_NK).max() > 1e-3
    assert np.abs(exact.logprobs_NK - generated.topk_logprobs_NK).max() < 1e-5


def test_what_cannot_be_drawn_again_is_not(
    tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    """Stop strings and samples of the tail belong to the set, not to scoring it again."""
    spec = make_spec(k=K, max_tokens=4)
    spec = spec.model_copy(update={"columns": ("entropy", CountsSpec(draws=3))})
    sample = labelled(tiny_teacher, spec, make_request(PROMPT))
    assert "tail_ids" in sample.optional
    with_stop = make_spec(k=K, stop=("x",))
    spec = spec.model_copy(update={"generation": with_stop.generation})
    assert set(score(tiny_teacher, spec, sample).scalars) == {"entropy"}
