"""Which checkpoint a training goes on from, and which one it refuses; with an engine made up."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from student_train.checkpoints.checkpoint import CHECKPOINTS_DIRECTORY, Checkpoints, SavedStep
from student_train.checkpoints.manifest import MANIFEST_FILE, Manifest
from student_train.config import LabelSource, TrainConfig, TrainJob
from student_train.errors import StudentError

PLAN = "plan-of-24-samples"
WEIGHTS = "mp_rank_00_model_states.pt"


class Engine:
    """Keeps its weights in one file, as DeepSpeed does in several."""

    def __init__(self, weights: str = "") -> None:
        self.weights = weights

    def save_checkpoint(self, directory: str, tag: str, save_latest: bool) -> None:
        assert not save_latest, "DeepSpeed's own pointer would move before all files are there"
        folder = Path(directory) / tag
        folder.mkdir(parents=True)
        (folder / WEIGHTS).write_text(self.weights)

    def load_checkpoint(self, directory: str, tag: str) -> None:
        self.weights = (Path(directory) / tag / WEIGHTS).read_text()


@pytest.fixture(autouse=True)
def group_of_one() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    model = tmp_path / "untrained"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("untrained weights")
    labels = LabelSource(store="/labels", label_set="1" * 32, selection="2" * 32)
    train = TrainConfig.model_validate({"model": str(model), "checkpoint": {"every_steps": 1}})
    return TrainJob(
        labels=labels,
        model=str(model),
        tokenizer=str(model),
        train=train,
        output=str(tmp_path / "run"),
    )


def changed(job: TrainJob, **train: Any) -> TrainJob:
    settings = {**job.train.model_dump(), **train}
    return job.model_copy(update={"train": TrainConfig.model_validate(settings)})


def folder(job: TrainJob, step: int) -> Path:
    return Path(job.output) / CHECKPOINTS_DIRECTORY / f"step-{step:08d}"


def save(job: TrainJob, *steps: int) -> None:
    checkpoints = Checkpoints(job, PLAN)
    for step in steps:
        checkpoints.save(Engine(f"weights of {step}"), step, {"taid": [step / 10]})


def find(job: TrainJob, plan: str = PLAN) -> SavedStep | None:
    return Checkpoints(job, plan).find()


def loaded(job: TrainJob) -> str:
    """The weights that a training goes on with."""
    checkpoints, engine = Checkpoints(job, PLAN), Engine()
    found = checkpoints.find()
    if found is not None:
        checkpoints.load(engine, found)
    return engine.weights


def steps(job: TrainJob) -> list[str]:
    return sorted(path.name for path in folder(job, 0).parent.glob("step-*"))


def test_a_new_training_has_none(job: TrainJob) -> None:
    assert find(job) is None


def test_the_newest_one_is_loaded_with_what_moves_beside_the_engine(job: TrainJob) -> None:
    save(job, 3, 5)
    found = find(job)
    assert found is not None
    assert (found.manifest.step, found.manifest.state, found.universal) == (
        5,
        {"taid": [0.5]},
        False,
    )
    assert loaded(job) == "weights of 5"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_ones_are_kept(job: TrainJob, keep: int) -> None:
    save(changed(job, checkpoint={"keep": keep}), 1, 2, 3, 4)
    assert steps(job) == [folder(job, step).name for step in range(5 - keep, 5)]


def test_random_numbers_go_on_where_they_were(job: TrainJob) -> None:
    torch.manual_seed(7)
    save(job, 1)
    expected = torch.rand(3).tolist()
    torch.manual_seed(8)
    loaded(job)
    assert torch.rand(3).tolist() == expected


def test_a_half_written_one_is_none_and_is_removed(job: TrainJob) -> None:
    """DeepSpeed's files are there, the manifest is not: a crash while saving."""
    save(job, 1)
    Engine("half").save_checkpoint(str(folder(job, 2).parent), folder(job, 2).name, False)
    assert loaded(job) == "weights of 1"
    assert steps(job) == ["step-00000001"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "cut": (lambda path: cut(path / WEIGHTS), "has 11 bytes instead of 12"),
    "flipped": (lambda path: flip(path / WEIGHTS), "has other bytes than were written"),
    "missing": (lambda path: (path / WEIGHTS).unlink(), "is missing"),
    "added": (lambda path: (path / "more.pt").write_text("x"), "is not in its manifest"),
    "manifest cut": (lambda path: cut(path / MANIFEST_FILE), "cannot be read"),
    "manifest emptied": (lambda path: (path / MANIFEST_FILE).write_text("{}"), "entry 'step'"),
}


@pytest.mark.parametrize("kind", sorted(DAMAGES))
def test_a_damaged_one_is_never_unpickled(
    job: TrainJob, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one before is taken with a warning, and it is an error where there is none."""
    damage, message = DAMAGES[kind]
    save(job, 1, 2)
    damage(folder(job, 2))
    assert loaded(job) == "weights of 1"
    assert message in capsys.readouterr().err
    assert steps(job) == ["step-00000001"]  # a later save must not count it among the kept ones
    damage(folder(job, 1))
    with pytest.raises(StudentError, match=r"no checkpoint in .* is whole .*start from the first"):
        find(job)


def test_other_settings_are_refused_field_by_field(job: TrainJob) -> None:
    save(job, 1)
    labels = job.labels.model_copy(update={"label_set": "9" * 32})
    other = changed(job, optimizer={"lr": 0.5}, epochs=3).model_copy(update={"labels": labels})
    with pytest.raises(StudentError) as caught:
        find(other)
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == [
        f"  labels.label_set: {'1' * 32} in the checkpoint, {'9' * 32} now",
        "  train.epochs: 1 in the checkpoint, 3 now",
        "  train.optimizer.lr: 1e-05 in the checkpoint, 0.5 now",
    ]
    assert str(folder(job, 1)) in lines[0]
    assert "to start from the first step" in lines[-1]


@pytest.mark.parametrize(
    "train",
    [
        {"deepspeed": {"stage": 2}},
        {"dtype": "float32"},
        {"batch": {"tokens": 99}},
        {"seed": 1},
        {"loss": "taid"},
        {"data": {"k": 3}},
        {"dropout": True},
    ],
    ids=str,
)
def test_what_decides_the_result_must_not_change(job: TrainJob, train: dict[str, Any]) -> None:
    save(job, 1)
    with pytest.raises(StudentError, match=f"train.{next(iter(train))}"):
        find(changed(job, **train))


def test_other_steps_or_an_other_untrained_student_are_refused(job: TrainJob) -> None:
    save(job, 1)
    with pytest.raises(StudentError, match=r"steps: plan-of-24-samples .* other-plan now"):
        find(job, "other-plan")
    Path(job.model, "model.safetensors").write_text("other weights")
    with pytest.raises(StudentError, match=r"\n  model: "):
        find(job)


@pytest.mark.parametrize(
    "train",
    [
        {"loader": {"workers": 3, "prefetch": 9}},
        {"checkpoint": {"every_steps": 77, "keep": 5}},
        {"batch": {"micro_tokens": 5}},
        {"activation_checkpointing": True},
        {"export_dtype": "float32"},
    ],
    ids=str,
)
def test_the_rest_may_change(job: TrainJob, train: dict[str, Any]) -> None:
    save(job, 1)
    assert find(changed(job, **train)) is not None


def test_labels_may_move_to_another_store(job: TrainJob) -> None:
    save(job, 1)
    moved = job.labels.model_copy(update={"store": "s3://elsewhere"})
    assert find(job.model_copy(update={"labels": moved})) is not None


def test_a_checkpoint_of_other_ranks_fits_without_conversion_where_nothing_is_sharded(
    job: TrainJob,
) -> None:
    save(job, 1)
    manifest = Manifest.load(folder(job, 1))
    manifest.model_copy(update={"world_size": 4}).save(folder(job, 1))
    assert loaded(job) == "weights of 1"


class TestCopies:
    """Copies in another place bring a training back whose run folder was lost."""

    @pytest.fixture
    def copied(self, job: TrainJob, tmp_path: Path) -> TrainJob:
        return changed(job, checkpoint={"keep": 2, "uri": str(tmp_path / "copies")})

    def test_the_same_ones_are_kept(self, copied: TrainJob, tmp_path: Path) -> None:
        save(copied, 1, 2, 3)
        found = sorted(path.name for path in (tmp_path / "copies" / "run").iterdir())
        whole = [name for name in found if any((tmp_path / "copies" / "run" / name).iterdir())]
        assert whole == ["step-00000002", "step-00000003"]

    def test_a_lost_run_folder_goes_on_from_a_copy(self, copied: TrainJob) -> None:
        save(copied, 1, 2)
        _remove(Path(copied.output))
        assert loaded(copied) == "weights of 2"

    def test_a_damaged_one_is_replaced_by_its_copy(self, copied: TrainJob) -> None:
        save(copied, 1, 2)
        cut(folder(copied, 2) / WEIGHTS)
        assert loaded(copied) == "weights of 2"

    def test_a_damaged_copy_is_passed_over(self, copied: TrainJob, tmp_path: Path) -> None:
        save(copied, 1, 2)
        _remove(Path(copied.output))
        flip(tmp_path / "copies" / "run" / "step-00000002" / WEIGHTS)
        assert loaded(copied) == "weights of 1"

    def test_a_copy_without_its_manifest_is_none(self, copied: TrainJob, tmp_path: Path) -> None:
        save(copied, 1)
        _remove(Path(copied.output))
        (tmp_path / "copies" / "run" / "step-00000001" / MANIFEST_FILE).unlink()
        assert find(copied) is None

    def test_a_place_that_cannot_be_written_does_not_end_the_training(
        self, copied: TrainJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checkpoints = Checkpoints(copied, PLAN)
        place = tmp_path / "copies"
        _remove(place)
        place.write_text("a file where the folder was")
        checkpoints.save(Engine("weights of 1"), 1, {})
        assert "step-00000001 could not be copied, training goes on" in capsys.readouterr().err
        assert loaded(job_without_copies(copied)) == "weights of 1"

    def test_they_go_with_the_checkpoints(self, copied: TrainJob, tmp_path: Path) -> None:
        save(copied, 1)
        Checkpoints(copied, PLAN).remove()
        assert not folder(copied, 1).parent.exists()
        assert [path for path in (tmp_path / "copies").rglob("*") if path.is_file()] == []


def job_without_copies(job: TrainJob) -> TrainJob:
    return changed(job, checkpoint={})


def _remove(path: Path) -> None:
    for child in sorted(path.rglob("*"), reverse=True):
        child.rmdir() if child.is_dir() else child.unlink()
    path.rmdir()


def test_removing_what_is_not_there_is_no_error(job: TrainJob) -> None:
    Checkpoints(job, PLAN).remove()


def test_a_manifest_holds_plain_values_only(job: TrainJob) -> None:
    save(job, 1)
    manifest = json.loads((folder(job, 1) / MANIFEST_FILE).read_text())
    assert manifest["settings"]["train.optimizer.lr"] == 1e-5
    assert set(manifest["files"]) == {WEIGHTS, "random-00000.json"}
