"""The run folder: one process at a time, and a story that survives crashes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.project import Project, teacher_forward_tokens
from storage.errors import DistillError

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
