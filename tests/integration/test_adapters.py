"""A teacher with a LoRA adapter: vLLM, and peft on transformers, give the same labels."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from storage.fingerprint import DigestMemo, fingerprint_model
from storage.keys import GenerationSpec, LabelSetSpec, SamplingSpec, TopKSpec, sample_key
from storage.qa import QaConfig
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.store import LabelStore
from teacher_server.backends.base import TeacherJob, start_backend
from teacher_server.certify import certify
from teacher_server.config import BackendConfig, TransformersBackendConfig, VllmBackendConfig
from teacher_server.errors import TeacherError

K, VOCAB_SIZE, CONTEXT = 16, 260, 64
FP32_NATS = 1e-4


@pytest.fixture(scope="module")
def adapter(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random matrices in all linear layers, of rank 5 and in one place 9."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    config = LoraConfig(
        r=5,
        lora_alpha=3,
        rank_pattern={"o_proj": 9},
        alpha_pattern={"o_proj": 2},
        target_modules="all-linear",
        init_lora_weights=False,
    )
    adapted = get_peft_model(model, config)
    directory = tmp_path_factory.mktemp("adapters") / "lora"
    adapted.save_pretrained(directory)
    return directory


def spec_of(teacher: Path, adapter: Path | None) -> LabelSetSpec:
    return LabelSetSpec(
        generation=GenerationSpec(
            teacher=fingerprint_model(teacher, DigestMemo(None), adapter=adapter),
            mode="generate",
            compute_dtype="float32",
            head_dtype="float32",
            sampling=SamplingSpec(
                temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=12, stop=(), seed=0
            ),
        ),
        kind=TopKSpec(k=K),
        columns=("entropy", "power_sums"),
        tail="exact",
        vocab_size=VOCAB_SIZE,
    )


@pytest.fixture(scope="module")
def job(tiny_teacher: Path, adapter: Path) -> Callable[[BackendConfig], TeacherJob]:
    def make(backend: BackendConfig) -> TeacherJob:
        return TeacherJob(
            model=str(tiny_teacher),
            adapter=str(adapter),
            backend=backend,
            spec=spec_of(tiny_teacher, adapter),
            max_model_len=CONTEXT,
        )

    return make


def prompts() -> list[SampleRequest]:
    requests = []
    for number in range(6):
        ids = np.array([2, *range(40 + number, 50 + 2 * number), 0, 3], dtype=np.int32)
        requests.append(SampleRequest(sample_key(ids, 0), 0, ids, None, ()))
    return requests


@pytest.fixture(scope="module")
def labelled(
    job: Callable[[BackendConfig], TeacherJob],
) -> Iterator[tuple[list[LabelledSample], list[LabelledSample]]]:
    """Answers of vLLM, and the same answers scored by it."""
    backend = start_backend(job(VllmBackendConfig(max_num_seqs=4)))
    answers = sorted(backend.label(prompts()), key=lambda sample: sample.key)
    given = [
        SampleRequest(s.key, 0, s.prompt_ids_P, s.response_ids_R, (), finish_reason=s.finish_reason)
        for s in answers
    ]
    yield answers, sorted(backend.label(given), key=lambda sample: sample.key)
    backend.close()


def rows_of(model: torch.nn.Module, sample: LabelledSample) -> np.ndarray:
    """Log-probs float64[R, V] of a response over all rows of the embedding, by one forward pass."""
    tokens = np.concatenate([sample.prompt_ids_P, sample.response_ids_R]).astype(np.int64)
    with torch.inference_mode():
        logits_TV = model(torch.from_numpy(tokens)[None]).logits[0]
    found: np.ndarray = logits_TV.double().log_softmax(dim=-1).numpy()
    return found[len(sample.prompt_ids_P) - 1 : -1]


def test_labels_of_vllm_are_those_of_peft(
    labelled: tuple[list[LabelledSample], list[LabelledSample]], tiny_teacher: Path, adapter: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    differences = []
    for sample in labelled[0]:
        rows_RV = rows_of(plain, sample)
        stored = np.take_along_axis(rows_RV, sample.topk_ids_NK.astype(np.int64), 1)
        differences.append(np.abs(stored - sample.topk_logprobs_NK).max())
    assert min(differences) > 0.05  # the adapter matters everywhere
    adapted = PeftModel.from_pretrained(plain, adapter)
    for samples in labelled:
        assert len(samples) == 6
        for sample in samples:
            rows_RV = rows_of(adapted, sample)
            live_RV = rows_RV[:, :VOCAB_SIZE]
            stored = np.take_along_axis(rows_RV, sample.topk_ids_NK.astype(np.int64), 1)
            np.testing.assert_allclose(sample.topk_logprobs_NK, stored, atol=FP32_NATS)
            best = -np.sort(-live_RV, axis=1)[:, :K]
            np.testing.assert_allclose(sample.topk_logprobs_NK, best, atol=FP32_NATS)
            tail = np.log1p(-np.exp(stored).sum(axis=1))
            np.testing.assert_allclose(sample.log_tail_mass_N, tail, atol=FP32_NATS)
            entropy = -(np.exp(rows_RV) * rows_RV).sum(axis=1)
            np.testing.assert_allclose(sample.entropy_N, entropy, atol=FP32_NATS)


def test_labels_of_the_reference_are_the_same(
    labelled: tuple[list[LabelledSample], list[LabelledSample]],
    job: Callable[[BackendConfig], TeacherJob],
) -> None:
    backend = start_backend(job(TransformersBackendConfig()))
    for sample in labelled[0]:
        request = SampleRequest(sample.key, 0, sample.prompt_ids_P, sample.response_ids_R, ())
        (found,) = backend.label([request])
        for name in ("topk_logprobs_NK", "log_tail_mass_N", "token_logprob_N", "entropy_N"):
            np.testing.assert_allclose(
                getattr(found, name), getattr(sample, name), atol=FP32_NATS, err_msg=name
            )


def test_certificates_use_the_adapter(
    labelled: tuple[list[LabelledSample], list[LabelledSample]],
    tiny_teacher: Path,
    adapter: Path,
    tmp_path: Path,
) -> None:
    store = LabelStore(str(tmp_path / "labels"), create=True)
    label_set = store.create(spec_of(tiny_teacher, adapter), {})
    label_set.append(labelled[0], {})
    found = certify(label_set, str(tiny_teacher), QaConfig(), adapter=str(adapter))
    assert (found.verdict, found.reasons) == ("fit", ())
    with pytest.raises(TeacherError, match="a teacher with 1 adapters, and None was given"):
        certify(label_set, str(tiny_teacher), QaConfig())
    # the labels of the adapted model under the name of the plain one
    wrong = store.create(spec_of(tiny_teacher, None), {})
    wrong.append(labelled[0], {})
    assert certify(wrong, str(tiny_teacher), QaConfig()).verdict == "unfit"


def test_a_project_labels_with_an_adapter(
    project_file: Path, adapter: Path, distill: Callable[..., Any]
) -> None:
    """Ray workers, the certificate, and its check from what the label set says of itself."""
    settings = ("--set", f"teacher.adapter={adapter}", "--set", "label.sampling.max_tokens=8")
    settings += ("--set", "label.qa.enabled=false")  # certified below
    labelled = json.loads(distill("label", project_file, *settings, "--json").stdout)
    store = project_file.parent / "labels"
    certify = ("certify", labelled["label_set"], "--store", store, "--force", "--samples", 1)
    (found,) = json.loads(distill(*certify, "--json").stdout)
    assert found["verdict"] == "fit"
    moved = adapter.parent / "moved"
    moved.mkdir()
    refused = distill(*certify, "--adapter", moved, expect=2)
    assert "adapter_model.safetensors" in refused.stderr
