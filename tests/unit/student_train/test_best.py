"""The best student on disk: what a crash, a resume and the end of the training make of it."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from student_train.config import MODEL_DIRECTORY, LabelSource, TrainConfig, TrainJob
from student_train.errors import StudentError
from student_train.watching import best
from student_train.watching.best import BEST_DIRECTORY, BestStudent


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, without a process group."""
    monkeypatch.setattr(best, "gather_over_ranks", lambda value: [value])


class Run:
    """A training whose students are text files."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.job = TrainJob(
            labels=LabelSource(store="s", label_set="l", selection="x"),
            model="m",
            tokenizer="t",
            train=TrainConfig(model="m"),
            output=str(output),
        )

    def started(self, finished_steps: int) -> BestStudent:
        return BestStudent(self.job, self._export, writes=True, finished_steps=finished_steps)

    def candidates(self) -> list[str]:
        return sorted(place.name for place in (self.output / BEST_DIRECTORY).glob("*"))

    def exported(self) -> str:
        return (self.output / MODEL_DIRECTORY / "weights").read_text()

    def _export(
        self, job: TrainJob, facts: Mapping[str, str], metrics: Mapping[str, float]
    ) -> None:
        directory = Path(job.output) / MODEL_DIRECTORY
        directory.mkdir(parents=True)
        (directory / "weights").write_text(facts["of"])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_the_best_student_takes_the_place_of_the_exported_one(run: Run) -> None:
    students = run.started(0)
    students.keep(3, {"of": "step 3"}, {})
    students.keep(6, {"of": "step 6"}, {})
    assert run.candidates() == ["step-00000006"]
    students.publish()
    assert run.exported() == "step 6"
    assert not (run.output / BEST_DIRECTORY).exists()


def test_what_was_best_at_the_checkpoint_outlives_a_better_one(run: Run) -> None:
    """After a crash the training goes on from step 4, and may come to another result."""
    students = run.started(0)
    students.keep(3, {"of": "step 3"}, {})
    students.checkpointed()
    students.keep(6, {"of": "step 6"}, {})
    students.keep(9, {"of": "step 9"}, {})
    assert run.candidates() == ["step-00000003", "step-00000009"]
    resumed = run.started(4)
    assert run.candidates() == ["step-00000003"]
    assert resumed.restore(3)
    resumed.publish()
    assert run.exported() == "step 3"


def test_a_checkpoint_makes_room(run: Run) -> None:
    students = run.started(0)
    students.keep(3, {"of": "step 3"}, {})
    students.checkpointed()
    students.keep(6, {"of": "step 6"}, {})
    students.checkpointed()
    assert run.candidates() == ["step-00000006"]


def test_a_student_that_an_older_checkpoint_knew_and_is_gone_is_sought_anew(run: Run) -> None:
    assert not run.started(4).restore(3)
    assert not run.started(0).restore(None)


def test_a_crash_in_the_middle_of_publishing_is_made_good(run: Run) -> None:
    students = run.started(0)
    students.keep(3, {"of": "step 3"}, {})
    (run.output / BEST_DIRECTORY / "step-00000003" / "adapter").mkdir()
    (run.output / BEST_DIRECTORY / "step-00000003" / "adapter").rename(run.output / "adapter")
    students.publish()
    assert run.exported() == "step 3"


def test_a_student_that_somebody_removed_is_an_error(run: Run) -> None:
    students = run.started(0)
    students.keep(3, {"of": "step 3"}, {})
    (run.output / BEST_DIRECTORY / "step-00000003" / MODEL_DIRECTORY / "weights").unlink()
    (run.output / BEST_DIRECTORY / "step-00000003" / MODEL_DIRECTORY).rmdir()
    with pytest.raises(StudentError, match="of step 3, is not in"):
        students.publish()


def test_without_a_candidate_nothing_is_published(run: Run) -> None:
    run.started(0).publish()
    assert not (run.output / MODEL_DIRECTORY).exists()
