"""What a resume may rely on: the log holds each step once, and a foreign checkpoint is refused."""

import json
from pathlib import Path

import pytest

from student_train.checkpoint import POINTER, Checkpoints
from student_train.errors import StudentError
from student_train.trainer import MetricsLog

IDENTITY = {"job": "a" * 32, "world_size": "2"}


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_new_log_holds_one_line_per_step(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.add({"step": step})
        assert steps(path)[-1] == step  # visible at once
    assert steps(path) == [1, 2, 3]


def test_steps_after_the_checkpoint_are_logged_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path, 0)
    for step in (1, 2, 3, 4, 5):
        first.add({"step": step})
    resumed = MetricsLog(path, 3)  # the checkpoint was written after step 3
    for step in (4, 5, 6):
        resumed.add({"step": step})
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    MetricsLog(path, 2).add({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_a_training_without_a_checkpoint_starts_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsLog(path, 0)
    assert path.read_text() == ""


def test_without_a_pointer_nothing_is_finished(tmp_path: Path) -> None:
    """A folder of a half-written checkpoint is no checkpoint."""
    (tmp_path / "step-00000010").mkdir()
    assert Checkpoints(tmp_path, IDENTITY).load(engine=None) == 0


@pytest.mark.parametrize("name", sorted(IDENTITY))
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, name: str) -> None:
    pointer = {"tag": "step-00000010", "step": 10, **IDENTITY, name: "other"}
    (tmp_path / POINTER).write_text(json.dumps(pointer))
    with pytest.raises(StudentError, match=f"was written for {name} 'other'") as caught:
        Checkpoints(tmp_path, IDENTITY).load(engine=None)
    assert str(tmp_path) in str(caught.value)  # what to remove


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "none", IDENTITY).remove()
