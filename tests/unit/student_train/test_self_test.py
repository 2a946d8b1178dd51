"""A student equal to the teacher has a loss near 0; whatever is misread shows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from storage.keys import TeacherFingerprint, sample_key
from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from student_train.config import LabelSource, SupervisionConfig, TrainConfig, TrainJob
from student_train.errors import PreflightError
from student_train.losses import DIVERGENCES
from student_train.losses.linear_head import LinearHead
from student_train.models import student as student_model
from student_train.models.head import head_of
from student_train.models.student import Student
from student_train.preflight import self_test as module
from student_train.preflight.self_test import SelfTest, self_test
from student_train.streaming.reader import MicroBatch, collate
from teacher_server.backends.base import TeacherJob, start_backend
from teacher_server.config import (
    LabelConfig,
    TeacherConfig,
    TransformersBackendConfig,
    label_set_spec,
)
from tests.conftest import VOCAB_SIZE, prompt_text

EFFECTIVE_VOCAB_SIZE = 260
"""Ids of the tokenizer. The embedding has ``VOCAB_SIZE`` rows, and random ones get probability."""

CHAT: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}


@pytest.fixture(scope="module")
def label(
    tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TrainJob]:
    """A function that has the teacher label ten prompts in a dtype; returns a training on them."""

    def make(dtype: str) -> TrainJob:
        spec = label_set_spec(
            TeacherConfig(model=str(tiny_teacher), dtype=dtype),  # type: ignore[arg-type]
            LabelConfig.model_validate({"kind": {"k": 16}, "sampling": {"max_tokens": 12}}),
            fingerprint=TeacherFingerprint(weights="w", config="c"),
            vocab_size=EFFECTIVE_VOCAB_SIZE,
            tokenizer="t",
        )
        tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
        rows = [[{"role": "user", "content": prompt_text(number)}] for number in range(10)]
        prompts = [
            np.array(tokenizer.apply_chat_template(row, **CHAT), dtype=np.int32) for row in rows
        ]
        requests = tuple(SampleRequest(sample_key(p, 0), 0, p, None, ()) for p in prompts)
        backend = start_backend(
            TeacherJob(
                model=str(tiny_teacher),
                backend=TransformersBackendConfig(),
                spec=spec,
                max_model_len=64,
            )
        )
        store = LabelStore(str(tmp_path_factory.mktemp("store")), create=True)
        label_set = store.create(spec, {})
        label_set.append(list(backend.label(requests)), {})
        return TrainJob(
            labels=LabelSource(
                store=store.uri,
                label_set=label_set.key,
                selection=Selection(requests).save(store.objects),
            ),
            model=str(tiny_teacher),
            tokenizer=str(tiny_teacher),
            train=TrainConfig.model_validate(
                {"model": str(tiny_teacher), "batch": {"tokens": 512, "micro_tokens": 128}}
            ),
            output="unused",
        )

    return make


@pytest.fixture(scope="module")
def job(label: Callable[[str], TrainJob]) -> TrainJob:
    return label("float32")


def values(found: SelfTest) -> dict[str, float]:
    return {measured.name: measured.value for measured in found.measured}


@pytest.mark.parametrize("packing", ["first_fit", "length_sorted", "padded"])
def test_the_teacher_has_no_loss_against_its_own_labels(job: TrainJob, packing: str) -> None:
    batch = job.train.batch.model_copy(update={"packing": packing})
    train = job.train.model_copy(update={"batch": batch})
    found = self_test(job.model_copy(update={"train": train}))
    found.require_passed()
    assert (found.num_samples, found.dtype) == (10, "float32")
    assert found.num_rows > 60
    names = set(values(found))
    assert names == {*DIVERGENCES, *(f"taid (t = {t})" for t in ("0", "0.5", "1"))} - {"taid"} | {
        "cross-entropy against stored"
    }
    squared = [value for name, value in values(found).items() if not name.startswith(("tvd", "cr"))]
    assert max(map(abs, squared)) < 2e-5  # rounding of the cache, and no more
    assert found.cross_entropy == pytest.approx(found.teacher_cross_entropy, abs=2e-3)
    assert found.cross_entropy > 0.1


def test_labels_in_bfloat16_are_compared_in_bfloat16(label: Callable[[str], TrainJob]) -> None:
    found = self_test(label("bfloat16"))
    found.require_passed()
    assert found.dtype == "bfloat16"
    assert values(found)["forward_kl"] > 1e-6


def test_labels_of_a_row_further_on_are_found(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(*samples: Any, **options: Any) -> MicroBatch:
        batch = collate(*samples, **options)
        last = batch.input_ids_BT.numel() - 1
        return replace(batch, rows_M=(batch.rows_M + 1).clamp_max(last))

    monkeypatch.setattr(module, "collate", shifted)
    with pytest.raises(PreflightError, match=r"loss near 0, found forward_kl [1-9].*cross-entropy"):
        self_test(job).require_passed()


@pytest.mark.parametrize("first", [1, -1])
def test_another_slice_of_the_vocabulary_is_found(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Every token has the logit of its neighbour."""

    def sliced(model: Any) -> LinearHead:
        head = head_of(model)
        return replace(head, weight_VH=head.weight_VH.roll(first, dims=0))

    monkeypatch.setattr(student_model, "head_of", sliced)
    with pytest.raises(PreflightError, match=r"found forward_kl [1-9]"):
        self_test(job).require_passed()


def test_rows_of_padding_in_the_vocabulary_are_found(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_padding(model: Any, loss: SupervisionConfig, vocab_size: int) -> Student:
        assert vocab_size == EFFECTIVE_VOCAB_SIZE
        return Student(model, loss, VOCAB_SIZE)

    monkeypatch.setattr(module, "Student", with_padding)
    with pytest.raises(PreflightError, match="found forward_kl 0"):
        self_test(job).require_passed()


def test_documents_that_see_each_other_are_found(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = student_model.document_inputs

    def one_document(input_ids_BT: Any, ends: tuple[int, ...]) -> dict[str, Any]:
        return inputs(input_ids_BT, ends[-1:])

    monkeypatch.setattr(student_model, "document_inputs", one_document)
    found = self_test(job)
    with pytest.raises(PreflightError, match="found forward_kl"):
        found.require_passed()
    assert values(found)["forward_kl"] > 0.1


def test_another_teacher_is_found(job: TrainJob, tiny_student: Path) -> None:
    with pytest.raises(PreflightError, match="labels are of other weights than these"):
        self_test(job.model_copy(update={"tokenizer": str(tiny_student)})).require_passed()


def test_only_so_many_samples_are_looked_at(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SAMPLES", 4)
    assert self_test(job).num_samples == 4
    monkeypatch.setattr(module, "MAX_TOKENS", 1)
    assert self_test(job).num_samples == 1
