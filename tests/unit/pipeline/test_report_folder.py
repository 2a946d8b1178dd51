"""``distill report`` on run folders: finished, failed, interrupted, never planned, and moved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.project import Project
from pipeline.run import plan_project
from pipeline.steps.evaluate import evaluation_file
from pipeline.steps.plan import Plan
from pipeline.stopping import StoppedError
from storage.errors import DistillError
from storage.testing import label_sample_densely

OpenProject = Callable[..., Project]
AsJson = Callable[..., Any]
TRAIN = ("train.model=./gone", "students.one.seed=1", "students.two.seed=2")


def make_plan(project: Project) -> Plan:
    with project.running():
        return plan_project(project)[1]


def label(project: Project, plan: Plan, count: int) -> None:
    """Labels of the first samples; the likeliest token has a third, or nearly everything."""
    logits_RV = np.zeros((4, plan.spec.vocab_size))
    logits_RV[:3, 0] = 30.0
    logits_RV[3, :3] = 30.0
    logprobs_RV = logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True))
    response_R = np.zeros(4, dtype=np.int32)
    samples = [
        label_sample_densely(request, response_R, logprobs_RV, plan.spec)
        for request in plan.requests()[:count]
    ]
    project.store.create(plan.spec, {}).append(samples, {})


def publish(project: Project, plan: Plan, name: str, kl: float, *, samples: bool = True) -> None:
    """A student as training and evaluation leave it; ``kl`` grows by 1 from sample to sample."""
    directory = project.directory / "students" / f"{name}-{'0' * 12}"
    directory.mkdir(parents=True)
    train = project.config.student_configs()[name]
    metrics = [
        {"step": n, "loss": 3.0 - n, "soft": 2.0 - n, "hard": 4.0 - n, "tokens": 10} for n in (1, 2)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    result = {
        "name": name,
        "key": name * 4,
        "train": train.model_dump(mode="json"),
        "untrained": "f" * 32,
        "label_set": plan.spec.key,
        "steps": 2,
        "trained_tokens": 20,
        "teacher_forward_tokens": 0,
    }
    (directory / "student.json").write_text(json.dumps(result))
    evaluation(project, plan, directory, kl, samples=samples)


def evaluation(
    project: Project, plan: Plan, directory: Path, kl: float, *, samples: bool = True
) -> None:
    name = evaluation_file(project.config.evaluate, plan.spec.key, plan.selection_keys["heldout"])
    keys = plan.selections["heldout"].sample_keys
    measured = [
        {"sample_key": key, "num_tokens": 4, "kl": 4 * (kl + n), "worst_position": n}
        for n, key in enumerate(keys)
    ]
    result = {"metrics": {"kl": kl}, "num_tokens": 8, "generations": []}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(
        json.dumps({**result, **({"samples": measured} if samples else {})})
    )


def finished(project: Project, *, samples: bool = True) -> Plan:
    plan = make_plan(project)
    label(project, plan, 6)
    untrained = project.directory / "untrained" / ("f" * 12)
    evaluation(project, plan, untrained, 3.0, samples=samples)
    publish(project, plan, "one", 1.0, samples=samples)
    publish(project, plan, "two", 2.0, samples=samples)
    project.note("started", step="label", label_set=plan.spec.key, samples=6)
    project.note("finished", step="label", seconds=5.0, teacher_forward_tokens=100)
    project.note("started", step="train", students=["one", "two"])
    project.note("finished", step="train", students=["one", "two"], seconds=9.0, trained_tokens=40)
    return plan


def test_a_finished_run_has_all_parts(open_project: OpenProject, as_json: AsJson) -> None:
    project = open_project(*TRAIN)
    plan = finished(project)
    report = as_json("report", str(project.directory))
    assert report["state"]["outcome"] == "finished"
    assert [s["name"] for s in report["students"]] == ["one", "two"]
    assert [e["name"] for e in report["evaluations"]] == ["untrained", "one", "two"]
    assert all("samples" not in e for e in report["evaluations"])
    assert report["certificates"] == [
        {"label_set": plan.spec.key, "verdict": "none", "reasons": []}
    ]
    page = (project.directory / "report.html").read_text()
    assert "Nobody has scored a sample of these labels again" in page


def test_positions_are_shared_out_by_the_confidence_of_the_teacher(
    open_project: OpenProject, as_json: AsJson
) -> None:
    """Of the four positions of each of two held-out samples three are certain, one is a third."""
    project = open_project(*TRAIN)
    finished(project)
    positions = as_json("report", str(project.directory))["positions"]
    assert (positions["split"], positions["samples"], positions["positions"]) == ("heldout", 2, 8)
    counts = {role["role"]: role["count"] for role in positions["roles"]}
    assert counts == {"bridge-like": 6, "between": 0, "garden-like": 2}
    assert [found["count"] for found in positions["confidence"]] == [0, 0, 0, 2, 0, 0, 0, 0, 0, 6]
    # ln 3 nats lie between 1.0 and 1.5
    assert [found["count"] for found in positions["entropy"]] == [6, 0, 0, 2, 0, 0, 0]
    garden = positions["roles"][2]
    assert garden["mean_entropy"] == pytest.approx(np.log(3), abs=1e-3)
    assert garden["entropy_share"] == pytest.approx(1.0, abs=1e-3)


def test_the_teacher_is_paid_once(open_project: OpenProject, as_json: AsJson) -> None:
    project = open_project(*TRAIN, "cluster.student_workers=2", "cluster.gpus_per_worker=3")
    plan = finished(project)
    summary = as_json("report", str(project.directory))["cost_summary"]
    needed = sum(len(request.prompt_ids_P) + 4 for request in plan.requests())
    assert summary["teacher_once"] == {
        "students": 2,
        "paid_tokens": 100,
        "paid_device_seconds": 5.0,
        "needed_tokens": needed,
        "separate_tokens": 2 * needed,
        "separate_device_seconds": 10.0,
        "in_loop_tokens": 40,
    }
    phases = {phase["phase"]: phase for phase in summary["phases"]}
    assert (phases["train"]["seconds"], phases["train"]["device_seconds"]) == (9.0, 54.0)
    assert phases["teacher"]["bytes"] > 0


def test_worst_and_most_improved_samples_lead_into_the_viewer(
    open_project: OpenProject, as_json: AsJson
) -> None:
    project = open_project(*TRAIN)
    plan = finished(project)
    one, two = as_json("report", str(project.directory))["samples"]
    first, second = plan.selections["heldout"].sample_keys
    assert [s["sample_key"] for s in one["worst"]] == [second, first]
    assert [(s["kl"], s["untrained_kl"]) for s in one["worst"]] == [(2.0, 4.0), (1.0, 3.0)]
    # both gained 2 nats: the smaller key is first
    assert [s["sample_key"] for s in one["improved"]] == sorted([first, second])
    worst = one["worst"][0]
    directory = str(project.directory / "students" / f"one-{'0' * 12}")
    assert worst["view"] == f"http://127.0.0.1:8601/sample/{second}?by=kl#p1"
    assert worst["inspect"].split() == [
        *("distill", "inspect", plan.spec.key, "--store", project.store_uri),
        *("--student", directory, "--sample", second, "--by", "kl", "--position", "1"),
    ]
    assert one["viewers"][0].endswith(f"--student {directory} --port 8601")
    assert two["viewers"][0].endswith("--port 8602")
    assert worst["prompt"] == "w6 w7"


def test_evaluations_of_before_samples_were_noted_are_read(
    open_project: OpenProject, as_json: AsJson
) -> None:
    project = open_project(*TRAIN)
    finished(project, samples=False)
    report = as_json("report", str(project.directory))
    assert report["samples"] is None
    assert "--force evaluate" in report["missing"]["samples"]
    assert [e["metrics"]["kl"] for e in report["evaluations"]] == [3.0, 1.0, 2.0]


def test_a_failed_run_says_where_why_and_how_to_go_on(
    open_project: OpenProject, project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = open_project(*TRAIN)
    plan = make_plan(project)
    label(project, plan, 5)
    with pytest.raises(RuntimeError), project.timed("train", students=["one"]):
        raise RuntimeError("<b>no space left</b>")
    sets = [word for override in TRAIN for word in ("--set", override)]
    assert main(["report", str(project_file), *sets]) == 0
    said = capsys.readouterr().out
    assert "tiny: failed at step train" in said
    assert "RuntimeError: <b>no space left</b>" in said
    assert f"go on with: distill run {project_file} --set train.model=./gone" in said
    report = project.read_json("report.json")
    assert report["state"]["missing"] == ["labels of 1 of 6 samples", "student one", "student two"]
    (cost,) = report["costs"]
    assert (cost["step"], cost["state"]) == ("train", "failed")
    page = (project.directory / "report.html").read_text()
    assert "<b>no space" not in page
    assert "&lt;b&gt;no space left" in page


@pytest.mark.parametrize(
    ("error", "outcome"), [(StoppedError("asked"), "stopped"), (None, "interrupted")]
)
def test_a_run_that_was_stopped_or_killed(
    open_project: OpenProject, as_json: AsJson, error: Exception | None, outcome: str
) -> None:
    project = open_project()
    make_plan(project)
    if error is None:
        project.note("started", step="label")  # and nothing follows
    else:
        with pytest.raises(StoppedError), project.timed("label"):
            raise error
    state = as_json("report", str(project.directory))["state"]
    assert (state["outcome"], state["step"]) == (outcome, "label")
    words = state["go_on"].split()
    assert words[:2] == ["distill", "run"]
    assert load_config(Path(words[2])) == project.config


def test_a_run_in_progress_is_reported_and_not_disturbed(
    open_project: OpenProject, as_json: AsJson
) -> None:
    project = open_project(*TRAIN)
    plan = make_plan(project)
    label(project, plan, 6)
    project.note("started", step="train")
    begun = project.directory / "students" / f"one-{'1' * 12}"
    begun.mkdir(parents=True)
    line = json.dumps({"step": 1, "loss": float("nan"), "soft": 1.0, "hard": 2.0, "tokens": 7})
    (begun / "metrics.jsonl").write_text(line + "\n" + line[:20])
    with FileLock(project.directory / ".lock"):
        report = as_json("report", str(project.directory))
    assert report["state"]["outcome"] == "running"
    assert report["state"]["go_on"] is None
    one, two = report["students"]
    assert (one["published"], one["steps"], one["curve"][0]["loss"]) == (False, 1, None)
    assert (two["published"], two["steps"]) == (False, 0)


def test_a_run_that_ended_before_its_plan_has_a_report(
    open_project: OpenProject, as_json: AsJson
) -> None:
    project = open_project(*TRAIN)
    with pytest.raises(ValueError, match="broken"), project.running(), project.timed("prepare"):
        raise ValueError("broken")
    report = as_json("report", str(project.directory))
    assert (report["state"]["outcome"], report["state"]["why"]) == ("failed", "ValueError: broken")
    for part in ("labels", "certificates", "positions", "response", "samples"):
        assert "before it knew which labels" in report["missing"][part]


def test_a_run_that_failed_before_any_step_began_says_why(
    open_project: OpenProject, as_json: AsJson, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is refused before a step has work leaves no cost, but a reason and its logs."""
    project = open_project(*TRAIN)
    with pytest.raises(DistillError), project.running(), project.at("train"):
        raise DistillError("the student does not fit the labels")
    report = as_json("report", str(project.directory))
    state = report["state"]
    assert (state["outcome"], state["step"]) == ("failed", "train")
    assert state["why"] == "DistillError: the student does not fit the labels"
    assert (project.directory / state["logs"]).is_dir()
    assert report["costs"] == []
    assert main(["report", str(project.directory)]) == 0
    assert f"logs: {project.directory / state['logs']}" in capsys.readouterr().out


def test_a_run_that_was_killed_between_two_steps_is_interrupted(
    open_project: OpenProject, as_json: AsJson
) -> None:
    project = open_project(*TRAIN)
    make_plan(project)
    project.note("run started", command="distill run")
    state = as_json("report", str(project.directory))["state"]
    assert (state["outcome"], state["step"]) == ("interrupted", None)
    assert "the last event is 'run started'" in state["why"]


def test_a_plan_that_fails_now_counts_though_everything_older_is_there(
    open_project: OpenProject, as_json: AsJson
) -> None:
    project = open_project(*TRAIN)
    finished(project)
    with pytest.raises(DistillError), project.running(), project.at("plan"):
        raise DistillError("train.jsonl, row 7: no prompt")
    state = as_json("report", str(project.directory))["state"]
    assert (state["outcome"], state["step"]) == ("failed", "plan")


def test_processes_that_died_and_what_labelling_cost_are_shown(
    open_project: OpenProject, as_json: AsJson
) -> None:
    project = open_project(*TRAIN)
    make_plan(project)
    with project.timed("label", samples=6) as cost:
        project.note("teacher died", reason="engine died", detail="SIGKILL")
        project.note("training died", student="one", why="out of memory")
        cost |= {
            "teacher_forward_tokens": 100,
            "response_tokens": 40,
            "engine_seconds": 12.5,
            "cost": 0.25,
            "failures": {"engine died": 1},
            "retried_samples": 2,
        }
    report = as_json("report", str(project.directory))
    assert [(p["step"], p["state"], p["error"]) for p in report["state"]["problems"]] == [
        ("label", "died", "engine died: SIGKILL"),
        ("train", "died", "one: out of memory"),
    ]
    (row,) = report["costs"]
    assert (row["engine_seconds"], row["cost"], row["failures"]) == (12.5, 0.25, {"engine died": 1})
    page = (project.directory / "report.html").read_text()
    assert "12.50 engine-seconds, cost 0.25, 1 x engine died, 2 samples given out again" in page


def test_what_a_failed_step_spent_is_counted(open_project: OpenProject, as_json: AsJson) -> None:
    project = open_project(*TRAIN)
    make_plan(project)

    def work() -> None:
        with project.timed("label") as cost:
            cost["teacher_forward_tokens"] = 100
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        work()
    (row,) = as_json("report", str(project.directory))["costs"]
    assert (row["state"], row["teacher_forward_tokens"]) == ("failed", 100)


def test_students_trained_at_once_hold_their_devices_together(
    open_project: OpenProject, as_json: AsJson
) -> None:
    project = open_project(*TRAIN, "cluster.student_workers=2", "cluster.gpus_per_worker=1")
    make_plan(project)
    project.note("started", step="train", students=["one", "two"], at_once=2)
    project.note("finished", step="train", students=["one", "two"], at_once=2, seconds=10.0)
    (row,) = as_json("report", str(project.directory))["costs"]
    assert (row["devices"], row["device_seconds"]) == (4.0, 40.0)


def test_a_folder_without_its_store_keeps_what_it_holds(
    open_project: OpenProject, as_json: AsJson
) -> None:
    project = open_project(*TRAIN)
    finished(project)
    shutil.rmtree(project.store_uri)
    report = as_json("report", str(project.directory))
    assert "does not exist" in report["missing"]["labels"]
    assert [e["name"] for e in report["evaluations"]] == ["untrained", "one", "two"]
    assert not Path(project.store_uri).exists()


def test_other_settings_do_not_show_students_of_old_ones(
    open_project: OpenProject, as_json: AsJson, project_file: Path
) -> None:
    project = open_project(*TRAIN)
    finished(project)
    sets = [word for override in TRAIN[:2] for word in ("--set", override)]
    report = as_json("report", str(project_file), *sets, "--set", "students.two.seed=3")
    assert [s["published"] for s in report["students"]] == [True, False]
    assert report["state"]["missing"] == ["student two"]


def test_what_failed_and_was_done_later_does_not_count(
    open_project: OpenProject, as_json: AsJson
) -> None:
    project = open_project(*TRAIN)
    finished(project)
    with pytest.raises(RuntimeError), project.timed("train", students=["three"]):
        raise RuntimeError("a student that nobody wants any more")
    state = as_json("report", str(project.directory))["state"]
    assert (state["outcome"], state["step"], len(state["problems"])) == ("finished", None, 1)


def test_an_unchanged_report_is_left_untouched(open_project: OpenProject) -> None:
    project = open_project(*TRAIN)
    finished(project)
    assert main(["report", str(project.directory)]) == 0
    before = (project.directory / "report.html").stat().st_mtime_ns
    assert main(["report", str(project.directory)]) == 0
    assert (project.directory / "report.html").stat().st_mtime_ns == before


def test_what_is_no_run_folder_is_refused(
    tmp_path: Path, project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert main(["report", str(project_file)]) == 2
    assert "was never run" in capsys.readouterr().err
