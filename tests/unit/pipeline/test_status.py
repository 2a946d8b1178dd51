"""The state of runs is seen from wherever the store is seen."""

import datetime
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import status as status_module
from pipeline.cli import main
from pipeline.project import Project
from pipeline.status import (
    SILENT_S,
    RunStatus,
    StatusBoard,
    StepStatus,
    statuses,
)
from pipeline.stopping import StoppedError
from storage.objects import Objects

OpenProject = Callable[..., Project]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(str(tmp_path / "store"), create=True)


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def board(objects: Objects, warnings: list[str], tmp_path: Path) -> StatusBoard:
    return StatusBoard(
        objects, project="tiny", directory=tmp_path, command="distill run", warn=warnings.append
    )


def only(objects: Objects) -> RunStatus:
    (found,) = statuses(objects)
    return found


def test_a_run_ends_as_its_block_does(objects: Objects, board: StatusBoard) -> None:
    with board.running():
        pass
    assert only(objects).state == "finished"
    with pytest.raises(StoppedError), board.running():
        raise StoppedError("asked to")
    assert only(objects).state == "stopped"
    with pytest.raises(ZeroDivisionError), board.running():
        _ = 1 / 0
    assert only(objects).state == "failed"


def test_steps_and_progress_are_seen_while_the_run_goes_on(
    objects: Objects, board: StatusBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_module, "PAUSE_S", 0.0)
    written = threading.Event()
    upload = objects.upload

    def noted(path: str, content: Path | bytes) -> None:
        upload(path, content)
        if b"labelling" in bytes(content if isinstance(content, bytes) else b""):
            written.set()

    monkeypatch.setattr(objects, "upload", noted)
    with board.running():
        board.step("label", StepStatus(state="running", started_at="2026-01-01T00:00:00+00:00"))
        board.progress("labelling", 3, 10, "5 tok/s")
        assert written.wait(30)
        seen = only(objects)
    assert seen.state == "running"
    assert list(seen.steps) == ["label", "labelling"]
    assert (seen.steps["labelling"].completed, seen.steps["labelling"].total) == (3, 10)
    board.progress("labelling", 10, 10, "")
    with board.running():
        pass
    assert only(objects).steps["labelling"].state == "finished"


def test_a_run_goes_on_where_its_status_cannot_be_written(
    objects: Objects, board: StatusBoard, warnings: list[str], tmp_path: Path
) -> None:
    (tmp_path / "store" / "runs").write_text("a file where a directory should be")
    with board.running():
        pass
    with board.running():
        pass
    (warning,) = warnings
    assert "does not show this run" in warning


def test_a_run_that_was_not_heard_of_is_silent(objects: Objects, board: StatusBoard) -> None:
    with board.running():
        pass
    ended = only(objects)
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2 * SILENT_S)
    assert not ended.is_silent(later)
    killed = ended.model_copy(update={"state": "running"})
    assert killed.is_silent(later)
    assert not killed.is_silent()


def test_what_is_no_status_is_left_out(objects: Objects, board: StatusBoard) -> None:
    with board.running():
        pass
    assert objects.create("runs/tiny/other.json", b'{"from": "a later version"}')
    assert objects.create("runs/tiny/half.json", b"{")
    assert only(objects).project == "tiny"


# -- the command ----------------------------------------------------------------------------------
def test_every_command_that_works_in_a_run_folder_leaves_its_status(
    project_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["plan", str(project_file)]) == 0
    capsys.readouterr()
    assert main(["status", "--store", str(tmp_path / "labels"), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["project"], run["state"], run["silent"]) == ("tiny", "finished", False)
    assert run["directory"] == str(tmp_path / "runs" / "tiny")
    assert main(["status", str(project_file)]) == 0
    assert "tiny: finished" in capsys.readouterr().out


def test_a_failed_step_says_why(open_project: OpenProject) -> None:
    project = open_project()

    def work() -> None:
        with project.running(), project.timed("label"):
            project.bars().show("labelling", 1, 6, "2 tok/s")
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        work()
    (run,) = statuses(project.store.objects, "tiny")
    assert run.state == "failed"
    assert run.steps["label"].state == "failed"
    assert run.steps["label"].note == "ValueError: boom"
    assert run.steps["labelling"].completed == 1


def test_two_run_folders_of_one_project_are_told_apart(
    open_project: OpenProject, tmp_path: Path
) -> None:
    for runs in ("here", "there"):
        project = open_project(f"runs={tmp_path / runs}")
        with project.running():
            pass
    assert len(statuses(project.store.objects)) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nobody"], "no run of project 'nobody'"),
        (["--watch", "--json"], "--watch and --json contradict"),
        (["gone.yaml"], "cannot read config"),
    ],
)
def test_what_cannot_be_shown_is_an_error(
    words: list[str], expected: str, tmp_path: Path, capsys: Capture
) -> None:
    Objects(str(tmp_path / "labels"), create=True)
    assert main(["status", *words, "--store", str(tmp_path / "labels")]) == 2
    assert expected in capsys.readouterr().err


def test_without_runs_there_is_nothing_to_show(tmp_path: Path, capsys: Capture) -> None:
    Objects(str(tmp_path / "labels"), create=True)
    assert main(["status", "--store", str(tmp_path / "labels")]) == 0
    assert "no runs yet" in capsys.readouterr().out
