"""The log of a training holds each step once, also after a crash."""

import json
from pathlib import Path

from student_train.watching.step_log import StepLog


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_new_log_holds_one_line_per_step(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = StepLog(path, 0)
    for step in (1, 2, 3):
        log.add({"step": step})
        assert steps(path)[-1] == step  # visible at once
    assert steps(path) == [1, 2, 3]


def test_steps_after_the_checkpoint_are_logged_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = StepLog(path, 0)
    for step in (1, 2, 3, 4, 5):
        first.add({"step": step})
    resumed = StepLog(path, 3)  # the checkpoint was written after step 3
    for step in (4, 5, 6):
        resumed.add({"step": step})
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    StepLog(path, 2).add({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_a_training_without_a_checkpoint_starts_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    StepLog(path, 0)
    assert path.read_text() == ""
