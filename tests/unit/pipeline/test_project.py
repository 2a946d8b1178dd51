"""The run folder: one process at a time, and a story that survives crashes."""

import errno
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.project import Project, teacher_forward_tokens
from pipeline.status import statuses
from storage.errors import DistillError, StoreAccessError
from storage.objects import Objects

ROOT = Path(__file__).resolve().parents[3]
OpenProject = Callable[..., Project]

SECOND_PROCESS = """
import sys
from pathlib import Path
from rich.console import Console
from pipeline.config import load_config
from pipeline.project import Project
from storage.errors import DistillError
try:
    with Project(load_config(Path(sys.argv[1])), Console()).running():
        print("got in")
except DistillError as error:
    print(error)
"""


@pytest.fixture
def project(open_project: OpenProject) -> Project:
    found = open_project()
    found.directory.mkdir(parents=True)
    return found


def run_second_process(project_file: Path) -> str:
    command = [sys.executable, "-c", SECOND_PROCESS, str(project_file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout


def test_a_second_process_is_refused_while_the_first_works(
    project: Project, project_file: Path
) -> None:
    with project.running():
        refused = run_second_process(project_file)
    assert f"another distill process is working in {project.directory}" in refused
    assert f"(process {os.getpid()} on {platform.node()}, since 20" in refused


def test_the_folder_is_free_again_after_a_failure(open_project: OpenProject) -> None:
    with pytest.raises(RuntimeError, match="boom"), open_project().running():
        raise RuntimeError("boom")
    with open_project().running():
        pass


def test_two_runs_in_one_process_are_refused_too(open_project: OpenProject) -> None:
    with open_project().running():  # noqa: SIM117 - the second one is the test
        with pytest.raises(DistillError, match="another distill process"):
            open_project().running().__enter__()


def test_what_runs_is_written_before_the_first_step(project: Project) -> None:
    with project.running():
        config = json.loads((project.directory / "config.json").read_text())
        provenance = json.loads((project.directory / "provenance.json").read_text())
    assert config["name"] == "tiny"
    assert config["evaluate"]["generations"] == 4  # defaults are filled in
    assert {"created_at", "git", "host", "command"} < set(provenance)


def test_relative_paths_become_absolute_for_workers_elsewhere(
    open_project: OpenProject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    project = open_project("store=here", "runs=there")
    assert project.store_uri == str(tmp_path / "here")
    assert project.directory == tmp_path / "there" / "tiny"


def test_the_address_of_a_remote_store_is_left_alone(open_project: OpenProject) -> None:
    assert open_project("store=s3://bucket/labels").store_uri == "s3://bucket/labels"


# -- events ---------------------------------------------------------------------------------------
def test_events_are_read_as_they_were_noted(project: Project) -> None:
    assert project.events() == []
    project.note("one", samples=3)
    project.note("two", models=["a", "b"], nested={"x": 1})
    one, two = project.events()
    assert (one["event"], one["samples"]) == ("one", 3)
    assert (two["models"], two["nested"]) == (["a", "b"], {"x": 1})


@pytest.mark.parametrize("torn", ['{"event": "tw', '{"event": "two", "nested": {"x": 1}', "{", ""])
def test_a_line_that_a_crash_cut_short_is_left_out_and_spoils_no_other(
    project: Project, torn: str
) -> None:
    project.note("one")
    with (project.directory / "events.jsonl").open("a") as stream:
        stream.write(torn)
    assert [event["event"] for event in project.events()] == ["one"]
    project.note("three")
    project.note("four")
    assert [event["event"] for event in project.events()] == ["one", "three", "four"]


def test_a_finished_step_is_noted_with_its_time_and_cost(project: Project) -> None:
    with project.timed("label", samples=2) as cost:
        cost["teacher_forward_tokens"] = 7
    started, finished = project.events()
    assert (started["event"], started["step"], started["samples"]) == ("started", "label", 2)
    assert (finished["event"], finished["step"], finished["samples"]) == ("finished", "label", 2)
    assert finished["teacher_forward_tokens"] == 7
    assert finished["seconds"] >= 0


@pytest.mark.parametrize("error", [ValueError("no luck"), KeyboardInterrupt()])
def test_a_failed_step_is_noted_and_raised(project: Project, error: BaseException) -> None:
    with pytest.raises(type(error)), project.timed("train", student="s"):
        raise error
    _, failed = project.events()
    assert (failed["event"], failed["step"], failed["student"]) == ("failed", "train", "s")
    assert failed["error"] == f"{type(error).__name__}: {error}"


def test_the_tokens_of_all_events_are_added(project: Project) -> None:
    for tokens in (3, 4):
        with project.timed("label") as cost:
            cost["teacher_forward_tokens"] = tokens
    assert teacher_forward_tokens(project.events()) == 7


def test_json_files_are_replaced_whole(project: Project) -> None:
    assert project.read_json("plans/x.json") is None
    project.write_json("plans/x.json", {"a": 1})
    project.write_json("plans/x.json", {"a": 2})
    assert project.read_json("plans/x.json") == {"a": 2}
    assert [path.name for path in (project.directory / "plans").iterdir()] == ["x.json"]


# -- a folder that explains itself ----------------------------------------------------------------
def test_what_fails_before_a_step_has_begun_is_noted_with_its_step(project: Project) -> None:
    with pytest.raises(DistillError, match="no"), project.running(), project.at("train"):
        raise DistillError("no labels")
    failed = next(event for event in project.events() if event["event"] == "failed")
    assert (failed["step"], failed["error"]) == ("train", "DistillError: no labels")


def test_a_failure_is_noted_once(project: Project) -> None:
    with pytest.raises(ValueError, match="boom"), project.running(), project.timed("label"):
        raise ValueError("boom")
    assert [event["event"] for event in project.events()] == [
        *("run started", "started", "failed", "run ended"),
    ]
    assert len({event["run"] for event in project.events()}) == 1


def test_run_json_tells_of_the_last_run(project: Project) -> None:
    with project.running(), project.timed("label", samples=3) as cost:
        assert project.read_json("run.json")["state"] == "running"
        cost["teacher_forward_tokens"] = 7
    run = project.read_json("run.json")
    assert (run["state"], run["process"], run["run"]) == ("finished", os.getpid(), project.run_id)
    label = run["steps"]["label"]
    assert (label["state"], label["samples"], label["teacher_forward_tokens"]) == (
        *("finished", 3),
        7,
    )
    assert {"started_at", "ended_at", "seconds"} < set(label)


def test_the_log_of_a_failed_run_holds_the_traceback(project: Project) -> None:
    with pytest.raises(KeyError), project.running(), project.timed("label"):
        raise KeyError("surprise")
    (file,) = (project.directory / "logs" / project.run_id).glob("driver-*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["message"] for line in lines if line.get("step") == "label"][:1] == ["started"]
    (failure,) = [line for line in lines if "traceback" in line]
    assert "surprise" in failure["traceback"]
    assert failure["level"] == "ERROR"


def test_the_guide_names_every_file_that_a_run_leaves(project: Project) -> None:
    with project.running():
        project.say("hello")
    guide = (project.directory / "README.txt").read_text()
    for path in project.directory.iterdir():
        if path.name != ".lock":
            assert path.name in guide


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_a_problem_that_the_user_can_fix(
    project: Project, number: int
) -> None:
    with pytest.raises(DistillError, match="it goes on where it stopped"), project.running():
        raise OSError(number, os.strerror(number), "/runs/tiny/students/a/metrics.jsonl")
    with pytest.raises(OSError, match="Connection refused"), project.running():
        raise OSError(errno.ECONNREFUSED, "Connection refused")


def test_a_store_that_cannot_be_written_is_named_with_the_way_out(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only store, as its medium reports it: nothing is left half-written."""

    def refuse(objects: Objects, path: str, data: bytes) -> bool:
        raise StoreAccessError(f"cannot write {path}: Read-only file system")

    monkeypatch.setattr(Objects, "create", refuse)
    with pytest.raises(StoreAccessError, match="the same command goes on") as raised:  # noqa: SIM117
        with project.running(), project.at("plan"):
            project.store.objects.create("selections/a.arrow", b"")
    assert f"written to the store {project.store_uri}" in str(raised.value)
    assert [event["step"] for event in project.events() if event["event"] == "failed"] == ["plan"]
    assert not list(Path(project.store_uri).glob("selections/*"))


def test_a_store_that_vanished_is_not_made_anew(project: Project) -> None:
    waiting = threading.Event()

    def lose_the_store() -> None:
        with project.running():
            while not statuses(project.store.objects):  # the first sign of life is written
                waiting.wait(0.01)
            Path(project.store_uri).rename(project.directory / "elsewhere")
            _ = project.store

    with pytest.raises(StoreAccessError, match="is gone, it was there when the run began"):
        lose_the_store()
    assert not Path(project.store_uri).exists()


def test_a_full_disk_does_not_hide_the_error_of_a_step(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = project.note

    def full(event: str, **facts: object) -> None:
        if event in ("failed", "run ended"):
            raise OSError(errno.ENOSPC, "No space left on device")
        note(event, **facts)

    monkeypatch.setattr(project, "note", full)
    with pytest.raises(ValueError, match="the cause"), project.running(), project.timed("label"):
        raise ValueError("the cause")
