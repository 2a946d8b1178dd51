"""Structured logs: every line says which run, step, process and student it is about."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.logs import RunLog, fields, log_context, stop_log

own, foreign = logging.getLogger("student_train.trainer"), logging.getLogger("some_library")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RunLog]:
    yield RunLog(str(tmp_path / "logs" / "r1"), "r1", "train")
    stop_log()


def lines(log: RunLog) -> list[dict[str, Any]]:
    (file,) = Path(log.directory).glob("trainer-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_line_names_run_step_process_and_context(log: RunLog) -> None:
    log.start("trainer", slot=1)
    with log_context(student="hard"):
        own.info("step %d", 3, extra=fields(loss=0.5, path=Path("/a")))
    own.info("outside")
    first, second = lines(log)
    assert (first["run"], first["step"], first["process"], first["slot"]) == (
        *("r1", "train", "trainer"),
        1,
    )
    assert (first["student"], first["message"], first["loss"]) == ("hard", "step 3", 0.5)
    assert (first["level"], first["logger"], first["path"]) == ("INFO", own.name, "/a")
    assert first["time"].endswith("+00:00")
    assert {"host", "pid"} < set(first)
    assert "student" not in second


def test_an_exception_is_kept_with_its_traceback(log: RunLog) -> None:
    log.start("trainer")
    try:
        raise ValueError("boom")
    except ValueError:
        own.exception("training failed")
    (line,) = lines(log)
    assert line["level"] == "ERROR"
    assert line["traceback"].startswith("Traceback")
    assert line["traceback"].endswith("ValueError: boom")


def test_libraries_are_heard_when_they_warn(log: RunLog) -> None:
    log.start("trainer")
    foreign.info("chatter")
    foreign.warning("out of disk")
    assert [line["message"] for line in lines(log)] == ["out of disk"]


def test_a_process_writes_one_log(log: RunLog) -> None:
    """A process that works for a second run, or a second time, does not write twice."""
    log.start("trainer")
    log.start("trainer")
    own.info("once")
    stop_log()
    own.info("not at all")
    assert [line["message"] for line in lines(log)] == ["once"]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be")
    RunLog(str(tmp_path / "logs" / "r1"), "r1").start("driver")
    own.info("nobody hears it")
    stop_log()
