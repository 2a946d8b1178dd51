"""``python -m student_train``: what is refused before a student is trained."""

import shutil
from pathlib import Path

import pytest

from storage.certificate import publish_certificate
from storage.label_set import LabelSet
from storage.store import LabelStore
from storage.testing import make_certificate
from student_train import __main__ as command
from student_train import trainer
from student_train.config import LabelSource, TrainConfig, TrainJob


def certify(label_set: LabelSet, *reasons: str) -> None:
    publish_certificate(label_set, lambda number: make_certificate(label_set, number, *reasons))


@pytest.fixture
def trained(labels: LabelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[TrainJob]:
    """Jobs whose training has begun; the command is about to be given one."""
    job = TrainJob(
        labels=labels,
        model=str(tmp_path / "untrained"),
        tokenizer=str(tmp_path / "teacher"),
        train=TrainConfig(model=str(tmp_path / "untrained")),
        output=str(tmp_path / "run"),
    )
    (tmp_path / "job.json").write_text(job.model_dump_json())
    monkeypatch.setattr("sys.argv", ["student_train", str(tmp_path / "job.json")])
    begun: list[TrainJob] = []
    monkeypatch.setattr(trainer, "train_student", lambda job, **_: begun.append(job))
    return begun


def test_labels_without_certificate_and_fit_ones_are_trained_on(
    trained: list[TrainJob], labels: LabelSource
) -> None:
    assert command.main() == 0
    certify(LabelStore(labels.store).open(labels.label_set))
    assert command.main() == 0
    assert len(trained) == 2


def test_unfit_labels_are_refused_until_a_better_certificate(
    trained: list[TrainJob], labels: LabelSource, capsys: pytest.CaptureFixture[str]
) -> None:
    label_set = LabelStore(labels.store).open(labels.label_set)
    certify(label_set, "entropy differs")
    assert command.main() == 2
    assert trained == []
    assert f"label set {label_set.key} is unfit by its certificate 1:\n  entropy" in (
        capsys.readouterr().err
    )
    certify(label_set)
    assert command.main() == 0
    assert len(trained) == 1


def test_a_damaged_certificate_stops_the_training(
    trained: list[TrainJob], labels: LabelSource, capsys: pytest.CaptureFixture[str]
) -> None:
    label_set = LabelStore(labels.store).open(labels.label_set)
    certify(label_set)
    (file,) = Path(labels.store).rglob("certificates/*.json")
    file.write_bytes(file.read_bytes()[:-2])
    assert command.main() == 2
    assert trained == []
    assert "00000001.json is not a" in capsys.readouterr().err


def test_unfit_labels_of_a_mixture_are_refused(
    trained: list[TrainJob], labels: LabelSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(labels.store, tmp_path / "good")
    certify(LabelStore(labels.store).open(labels.label_set), "entropy differs")
    job = TrainJob.model_validate_json((tmp_path / "job.json").read_text())
    good = labels.model_copy(update={"store": str(tmp_path / "good")})
    mixed = job.model_copy(update={"labels": good, "mixture": (labels,)})
    (tmp_path / "job.json").write_text(mixed.model_dump_json())
    assert command.main() == 2
    assert trained == []
    assert "is unfit" in capsys.readouterr().err
