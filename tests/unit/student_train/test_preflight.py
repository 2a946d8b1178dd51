"""A student that would misread the cached ids is refused before the first step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.errors import ConfigError
from storage.keys import MassSpec
from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train.config import HybridLossConfig, LabelSource
from student_train.data import LabelReader, collate
from student_train.errors import PreflightError
from student_train.losses.base import PADDING_ID
from student_train.model import Student
from student_train.preflight import check_labels_serve_loss, check_student_fits_labels
from student_train.schedules import StepState
from tests.unit.student_train.conftest import VOCAB_SIZE

SaveStudent = Callable[..., Path]


def check(student: Path, teacher: Path, labels: LabelSource) -> None:
    check_student_fits_labels(str(student), str(teacher), LabelReader(labels))


def test_a_student_with_the_teachers_tokenizer_fits(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    check(save_student(tmp_path / "student"), save_student(tmp_path / "teacher"), labels)


def test_a_student_whose_tokenizer_has_more_tokens_fits(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    student = save_student(tmp_path / "student")
    document = json.loads((student / "tokenizer.json").read_text())
    document["model"]["vocab"]["w40"] = 40
    (student / "tokenizer.json").write_text(json.dumps(document))
    check(student, save_student(tmp_path / "teacher"), labels)


def test_another_tokenizer_is_refused_naming_a_token(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    student = save_student(tmp_path / "student", swap_tokens=True)
    teacher = save_student(tmp_path / "teacher")
    expected = r"maps 2 of 40 tokens to other ids .*first: 'w7', 7 in the labels, 8 in the student"
    with pytest.raises(PreflightError, match=expected):
        check(student, teacher, labels)


def test_a_token_that_the_student_lacks_is_named(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    student = save_student(tmp_path / "student")
    document = json.loads((student / "tokenizer.json").read_text())
    del document["model"]["vocab"]["w39"]
    (student / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(PreflightError, match="'w39', 39 in the labels, None in the student"):
        check(student, save_student(tmp_path / "teacher"), labels)


def test_a_student_without_a_tokenizer_is_refused(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    student = save_student(tmp_path / "student")
    (student / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        check(student, save_student(tmp_path / "teacher"), labels)


@pytest.mark.parametrize("context", [11, 12])
def test_a_context_shorter_than_the_longest_sample_is_refused(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource, context: int
) -> None:
    # sample 5: a prompt of 4 + 5 % 3 = 6 tokens, a response of 2 + 5 = 7: 13 tokens
    student = save_student(tmp_path / "student", max_position_embeddings=context)
    expected = f"longest sample has 13 tokens, the student's context is {context}"
    with pytest.raises(PreflightError, match=expected):
        check(student, save_student(tmp_path / "teacher"), labels)


def test_a_context_of_exactly_the_longest_sample_fits(
    tmp_path: Path, save_student: SaveStudent, labels: LabelSource
) -> None:
    student = save_student(tmp_path / "student", max_position_embeddings=13)
    check(student, save_student(tmp_path / "teacher"), labels)


def test_labels_with_a_varying_number_of_tokens_fit(
    tmp_path: Path, save_student: SaveStudent, tiny_model: Callable[..., Any]
) -> None:
    """As many tokens as reach a mass: the rows of one batch store different numbers of them."""
    spec = make_spec(vocab_size=VOCAB_SIZE, kind=MassSpec(mass=0.5, cap=6))
    samples = [make_sample(number, spec, num_tokens=4) for number in range(3)]
    store = LabelStore(str(tmp_path / "store"), create=True)
    label_set = store.create(spec, {})
    label_set.append(samples, {})
    requests = (SampleRequest(s.key, s.sample_index, s.prompt_ids_P, None, ()) for s in samples)
    selection = Selection(tuple(requests)).save(store.objects)
    source = LabelSource(store=store.uri, label_set=label_set.key, selection=selection)
    student = save_student(tmp_path / "student")
    check(student, student, source)
    reader = LabelReader(source)
    batch = collate(reader.read(range(3)), "sampled", reader.spec)
    stored = (batch.labels.topk_ids_MK != PADDING_ID).sum(dim=-1)
    assert len(set(stored.tolist())) > 1
    model = Student(tiny_model(), HybridLossConfig(), reader.vocab_size)
    terms = model(batch, StepState(step=0, total_steps=1))
    assert bool(torch.isfinite(terms.total))
    terms.total.backward()


def test_a_loss_whose_columns_are_not_stored_is_refused_naming_them(labels: LabelSource) -> None:
    loss = HybridLossConfig.model_validate({"weight": {"type": "entropy", "measure": "power_sum"}})
    with pytest.raises(PreflightError, match=r"needs the label columns power_sum_10.*label again"):
        check_labels_serve_loss(loss, LabelReader(labels))


def test_a_loss_whose_columns_are_stored_is_served(labels: LabelSource) -> None:
    loss = HybridLossConfig.model_validate({"weight": "entropy"})
    check_labels_serve_loss(loss, LabelReader(labels))
