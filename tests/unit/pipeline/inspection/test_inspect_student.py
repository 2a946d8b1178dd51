"""A student on the same tokens: its numbers are those of evaluation and of a dense pass."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.inspection.page import render_sample
from pipeline.inspection.source import Inspector, find_vocabulary, student_names
from pipeline.inspection.student import StudentModel
from pipeline.inspection.testing import keys_of, make_store
from storage.errors import ConfigError
from storage.keys import MassSpec, TopKSpec
from storage.samples import LabelledSample
from storage.testing import make_sample, make_spec
from student_train.config import HybridLossConfig
from student_train.errors import PreflightError
from student_train.losses.config import ForwardKlConfig
from student_train.models.student import Student, load_causal_lm
from student_train.schedules import StepState
from student_train.streaming.reader import collate
from student_train.weights.config import StaticWeightConfig

VOCABULARY = 260
SPECS = {
    "topk": make_spec(vocab_size=VOCABULARY, kind=TopKSpec(k=8)),
    "mass": make_spec(vocab_size=VOCABULARY, kind=MassSpec(mass=0.7, cap=16)),
}


def sample_of(kind: str) -> LabelledSample:
    return make_sample(1, SPECS[kind], num_tokens=150)  # more than one chunk of rows


@pytest.mark.parametrize("kind", SPECS)
def test_the_divergence_is_that_of_evaluation(tiny_student: Path, kind: str) -> None:
    sample = sample_of(kind)
    model = load_causal_lm(str(tiny_student), "bfloat16").eval()
    loss = HybridLossConfig(soft=ForwardKlConfig(), weight=StaticWeightConfig(soft_weight=1.0))
    with torch.inference_mode():
        terms = Student(model, loss, VOCABULARY)(
            collate([sample], "sampled", SPECS[kind]), StepState(step=0, total_steps=1)
        )
    found = StudentModel(tiny_student, VOCABULARY, name="student").predict(sample)
    np.testing.assert_allclose(found.values["kl"], terms.soft_M.float().numpy(), atol=2e-3)
    np.testing.assert_allclose(found.values["surprise"], terms.hard_M.float().numpy(), atol=2e-3)
    # logits in bfloat16 are often equal, and evaluation takes any of the largest ones
    theirs_N1 = terms.student_argmax_M.numpy()[:, None]
    among_N = (found.topk_ids_NK == theirs_N1).any(axis=1)
    theirs_N = np.where(found.topk_ids_NK == theirs_N1, found.topk_logprobs_NK, -np.inf).max(axis=1)
    assert among_N.all()
    np.testing.assert_allclose(theirs_N, found.topk_logprobs_NK[:, 0])


def test_every_number_is_that_of_a_dense_pass(tiny_student: Path) -> None:
    sample = sample_of("topk")
    found = StudentModel(tiny_student, VOCABULARY, name="student").predict(sample)
    model = AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.bfloat16)
    ids = np.concatenate([sample.prompt_ids_P, sample.response_ids_R]).astype(np.int64)
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, :, :VOCABULARY].double()
    start = len(sample.prompt_ids_P) - 1
    logprobs_NV = logits.log_softmax(dim=-1).numpy()[start : start + len(sample.positions_N)]
    rows, tokens = np.arange(len(logprobs_NV)), sample.token_ids_N
    entropy_N = -(np.exp(logprobs_NV) * logprobs_NV).sum(axis=1)
    np.testing.assert_allclose(found.values["entropy"], entropy_N, atol=0.05)
    np.testing.assert_allclose(found.values["surprise"], -logprobs_NV[rows, tokens], atol=0.05)
    top_N8 = np.sort(logprobs_NV, axis=1)[:, ::-1][:, :8]
    np.testing.assert_allclose(found.topk_logprobs_NK, top_N8, atol=0.05)
    np.testing.assert_allclose(found.values["tail"], 1 - np.exp(top_N8).sum(axis=1), atol=0.02)
    np.testing.assert_allclose(found.values["bridge"], np.exp(top_N8[:, 0]), atol=0.02)
    assert (found.values["rank"] >= 1).all()
    assert (found.topk_ids_NK < VOCABULARY).all()


def test_the_folder_of_a_student_holds_its_model(tiny_student: Path, tmp_path: Path) -> None:
    (tmp_path / "hybrid-1234").mkdir()
    (tmp_path / "hybrid-1234" / "model").symlink_to(tiny_student)
    found = StudentModel(tmp_path / "hybrid-1234", VOCABULARY, name="hybrid")
    assert found.predict(sample_of("topk")).name == "hybrid"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model"):
        StudentModel(tmp_path, VOCABULARY, name="student")


def test_a_student_of_another_vocabulary_is_refused(tiny_student: Path) -> None:
    with pytest.raises(PreflightError, match="has 384 tokens, the labels use 500"):
        StudentModel(tiny_student, 500, name="student")


def test_students_have_different_names() -> None:
    assert student_names([Path("runs/a-1/model"), Path("runs/b-2")]) == ["a-1", "b-2"]
    assert student_names([Path("x/a/model"), Path("y/a")]) == ["x/a/model", "y/a"]


def test_a_student_beside_the_labels(tmp_path: Path, tiny_student: Path) -> None:
    label_set = make_store(tmp_path, ["hello world"])
    vocabulary = find_vocabulary(label_set, None)
    inspector = Inspector(label_set, "", vocabulary, students=[tiny_student])
    (found,) = inspector.read(keys_of(label_set))
    assert [model.kind for model in found.predictions] == ["labels", "student"]
    assert found.mean("kl") > 0
    assert "KL to the labels along the response" in render_sample(found, by="kl")
