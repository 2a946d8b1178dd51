"""Certificates of real labels: vLLM in bfloat16 against transformers, and a whole project."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.certificate import Certificate, newest_certificate
from storage.fingerprint import DigestMemo, fingerprint_model
from storage.keys import GenerationSpec, LabelSetSpec, SamplingSpec, TopKSpec, sample_key
from storage.label_set import LabelSet
from storage.qa import QaConfig
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.store import LabelStore
from storage.tail import logsumexp
from teacher_server.backends.base import TeacherJob, start_backend
from teacher_server.certify import certify
from teacher_server.config import VllmBackendConfig

K, VOCAB_SIZE, NUM_SAMPLES, NUM_TOKENS = 16, 260, 24, 24
Alter = Callable[[LabelledSample, LabelledSample], LabelledSample]


def spec_of(teacher: Path) -> LabelSetSpec:
    return LabelSetSpec(
        generation=GenerationSpec(
            teacher=fingerprint_model(teacher, DigestMemo(None)),
            mode="generate",
            compute_dtype="bfloat16",
            head_dtype="float32",
            sampling=SamplingSpec(
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                max_tokens=NUM_TOKENS,
                stop=(),
                seed=0,
            ),
        ),
        kind=TopKSpec(k=K),
        columns=("entropy", "power_sums"),
        tail="exact",
        vocab_size=VOCAB_SIZE,
    )


@pytest.fixture(scope="module")
def generated(tiny_teacher: Path) -> Iterator[list[LabelledSample]]:
    """24 answers of vLLM in bfloat16, the head in float32."""
    requests = []
    for number in range(NUM_SAMPLES):
        ids = np.array([2, *range(40 + number, 50 + 2 * number), 0, 3], dtype=np.int32)
        requests.append(SampleRequest(sample_key(ids, 0), 0, ids, None, ()))
    backend = start_backend(
        TeacherJob(
            model=str(tiny_teacher),
            backend=VllmBackendConfig(max_num_seqs=8),
            spec=spec_of(tiny_teacher),
            max_model_len=128,
        )
    )
    try:
        yield list(backend.label(requests))
    finally:
        backend.close()


@pytest.fixture
def store(tmp_path: Path, tiny_teacher: Path) -> Callable[..., LabelSet]:
    """A function that makes a label set of samples."""

    def make(samples: list[LabelledSample]) -> LabelSet:
        store = LabelStore(str(tmp_path / "labels"), create=True)
        label_set = store.create(spec_of(tiny_teacher), {"teacher": str(tiny_teacher)})
        label_set.append(samples, {})
        return label_set

    return make


def test_labels_of_vllm_in_bfloat16_are_within_its_noise(
    generated: list[LabelledSample], store: Callable[..., LabelSet], tiny_teacher: Path
) -> None:
    label_set = store(generated)
    found = certify(label_set, str(tiny_teacher), QaConfig())
    assert found.reasons == ()
    assert found.verdict == "fit"
    assert newest_certificate(label_set) == found
    agreement = found.agreement
    assert agreement is not None
    assert len(agreement.sample_keys) == NUM_SAMPLES
    for name in ("logprob", "token_logprob", "log_tail_mass", "entropy", "kl", "power_slope_50"):
        difference = agreement.differences[name]
        assert difference.typical_noise is not None
        assert 0 < difference.typical < 2 * difference.typical_noise
    assert agreement.padding_mass > 0.01  # 384 rows for 260 ids, and random weights
    assert found.provenance["backend"] == "transformers"


def consistent(sample: LabelledSample) -> LabelledSample:
    """With a token log-prob that fits the row, so that the store takes the sample."""
    is_token_NK = sample.topk_ids_NK == sample.token_ids_N[:, None]
    listed_N = is_token_NK.any(axis=1)
    listed_lp_N = np.where(is_token_NK, sample.topk_logprobs_NK, 0).sum(axis=1)
    token_N = np.where(listed_N, listed_lp_N, sample.topk_logprobs_NK[:, -1] - 0.5)
    rank_N = np.where(listed_N, is_token_NK.argmax(axis=1) + 1, K + 1)
    return replace(
        sample,
        token_logprob_N=token_N.astype(np.float32),
        token_rank_N=rank_N.astype(np.int32),
    )


def with_rows_of(sample: LabelledSample, other: LabelledSample, shift: int) -> LabelledSample:
    rows = (np.arange(len(sample.positions_N)) + shift) % len(other.positions_N)
    return replace(
        sample,
        topk_ids_NK=other.topk_ids_NK[rows],
        topk_logprobs_NK=other.topk_logprobs_NK[rows],
        log_tail_mass_N=other.log_tail_mass_N[rows],
        optional={name: values[rows] for name, values in other.optional.items()},
    )


def at_temperature(sample: LabelledSample, temperature: float) -> LabelledSample:
    both = np.concatenate([sample.topk_logprobs_NK, sample.log_tail_mass_N[:, None]], axis=1)
    both = both.astype(np.float64) / temperature
    both -= logsumexp(both)[:, None]
    return replace(
        sample,
        topk_logprobs_NK=both[:, :-1].astype(np.float32),
        log_tail_mass_N=both[:, -1].astype(np.float32),
    )


def with_optional(sample: LabelledSample, name: str) -> LabelledSample:
    return replace(sample, optional={**sample.optional, name: np.roll(sample.optional[name], 1)})


ALTERATIONS: dict[str, Alter] = {
    "ids permuted": lambda s, _: replace(s, topk_ids_NK=s.topk_ids_NK[:, ::-1].copy()),
    "shifted by one": lambda s, _: with_rows_of(s, s, -1),
    "labels of another sample": lambda s, other: with_rows_of(s, other, 0),
    "temperature 0.9": lambda s, _: at_temperature(s, 0.9),
    "entropy of another row": lambda s, _: with_optional(s, "entropy"),
    "power sum of another row": lambda s, _: with_optional(s, "power_slope_50"),
    "likeliest tokens": lambda s, _: replace(s, response_ids_R=s.topk_ids_NK[:, 0].copy()),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_altered_labels_are_refused(
    generated: list[LabelledSample],
    store: Callable[..., LabelSet],
    tiny_teacher: Path,
    name: str,
) -> None:
    altered = [
        consistent(ALTERATIONS[name](sample, generated[number - 1]))
        for number, sample in enumerate(generated[:8])
    ]
    found = certify(store(altered), str(tiny_teacher), QaConfig())
    assert found.verdict == "unfit"
    assert found.reasons


def test_a_project_is_certified_and_shown(
    project_file: Path, tmp_path: Path, distill: Callable[..., Any]
) -> None:
    """In float32, by the reference itself: what is left is the rounding of the store."""
    assert "fit (30 samples scored again" in distill("label", project_file).stdout
    said = distill("certify", project_file, "--json")
    (document,) = json.loads(said.stdout)
    found = Certificate.model_validate_json(json.dumps(document))
    assert (found.number, found.verdict, found.num_samples) == (1, "fit", 30)
    assert found.agreement is not None
    for name in ("logprob", "token_logprob", "entropy", "log_tail_mass"):
        assert found.agreement.differences[name].max < 5e-5
    assert found.drawing is not None
    assert found.drawing.method == "chi_square"
    key, store = found.label_set, tmp_path / "labels"
    shown = distill("show", key, "--store", store).stdout
    assert f"certificate {found.number} of label set {key}: fit" in shown
    # by its key: the teacher is where the provenance of the set says
    again = distill("certify", key, "--store", store, "--json", "--samples", "2")
    (second,) = json.loads(again.stdout)
    assert (second["number"], second["verdict"]) == (2, "fit")
    assert len(second["agreement"]["sample_keys"]) == 2
