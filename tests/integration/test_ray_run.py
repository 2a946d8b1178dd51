"""A whole project of tiny models under real Ray: label, train with DeepSpeed, evaluate, report."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from storage.store import LabelStore
from tests.conftest import REPOSITORY

Distill = Callable[..., subprocess.CompletedProcess[str]]

FAKE = ("--set", "teacher.backend={type: fake}")


def stored_keys(project_file: Path) -> Counter[str]:
    """How often each sample key stands in the committed files, read without our reader."""
    found: Counter[str] = Counter()
    for path in (project_file.parent / "labels").rglob("commits/*.json"):
        record = json.loads(path.read_text())
        for shard in record["shards"]:
            file = path.parent.parent / "shards" / f"{shard['name']}.samples.arrow"
            table = pa.ipc.open_file(file).read_all()
            found.update(table.column("sample_key").to_pylist())
    return found


def test_a_project_runs_once_and_is_reused_afterwards(project_file: Path, distill: Distill) -> None:
    first = json.loads(distill("run", project_file, "--json").stdout)
    assert first["labels"]["stored_samples"] == 30
    (student,) = first["students"]
    assert student["teacher_forward_tokens"] == 0
    untrained, trained = first["evaluations"]
    assert untrained["name"] == "untrained"
    assert trained["metrics"]["kl"] < untrained["metrics"]["kl"]
    assert len(trained["generations"]) == 2
    run_folder = project_file.parent / "runs" / "tiny"
    assert "<html" in (run_folder / "report.html").read_text()

    again = distill("run", project_file)
    assert "the teacher was called 0 times" in again.stdout
    assert "student hard: already published, skipped" in again.stdout
    events = [json.loads(line) for line in (run_folder / "events.jsonl").read_text().splitlines()]
    assert sum(e["event"] == "started" and e["step"] == "train" for e in events) == 1

    # one more student and two more prompts: only what is new is paid for
    with (project_file.parent / "train.jsonl").open("a") as stream:
        for number in (200, 201):
            stream.write(json.dumps({"prompt": f"fresh question {number}"}) + "\n")
    forecast = json.loads(distill("plan", project_file, "--json").stdout)
    assert (forecast["hits"], forecast["misses"]) == (30, 2)
    labelled = json.loads(distill("label", project_file, "--json").stdout)
    assert labelled["labelled"] == 2
    assert set(stored_keys(project_file).values()) == {1}


def test_a_teacher_that_dies_loses_nothing_that_was_committed(
    project_file: Path, distill: Distill
) -> None:
    """The fake teacher kills its process after 14 samples: 12 of them are committed by fours, so
    30 samples need three lives (12 + 12 + 6)."""
    overrides = ["--set", "teacher.backend={type: fake, crash_after_samples: 14}"]
    done = distill("label", project_file, *overrides, "--json")
    assert json.loads(done.stdout)["labelled"] == 30
    counts = stored_keys(project_file)
    assert len(counts) == 30
    assert set(counts.values()) == {1}
    events = (project_file.parent / "runs" / "tiny" / "events.jsonl").read_text()
    assert events.count("teacher died") == 2


def test_a_teacher_that_always_dies_fails_the_job_and_keeps_what_it_has(
    project_file: Path, distill: Distill
) -> None:
    """Lives of no sample at all: every sample that is tried is suspected until too many are."""
    distill("label", project_file, "--set", "data.heldout=[]", *FAKE)
    overrides = ["--set", "teacher.backend={type: fake, crash_after_samples: 0}"]
    strict = ["--set", "label.max_bad_samples=1"]
    failed = distill("label", project_file, *overrides, *strict, expect=2)
    assert "2 samples are in quarantine, label.max_bad_samples allows 1" in failed.stderr
    assert "engine died 3 times on this sample alone" in failed.stderr
    assert "Traceback" not in failed.stderr
    committed = LabelStore(str(project_file.parent / "labels"))
    (key,) = committed.keys()
    assert committed.open(key).totals().num_samples == 24
    resumed = distill("label", project_file, *FAKE, "--retry-quarantined", "--json")
    assert json.loads(resumed.stdout)["labelled"] == 6


def test_a_smaller_k_is_trained_from_the_labels_of_a_larger_one(
    project_file: Path, distill: Distill
) -> None:
    """A set of its own is made for the request, and stays empty."""
    wide = json.loads(distill("label", project_file, *FAKE, "--json").stdout)["label_set"]
    narrow = ("--set", "label.kind.k=8", "--set", "train.epochs=1", "--json")
    report = json.loads(distill("run", project_file, *FAKE, *narrow).stdout)
    assert report["labels"]["k"] == 8
    assert report["labels"]["served_by"] == {wide: 30}
    assert [cost["step"] for cost in report["costs"]].count("label") == 1
    (student,) = report["students"]
    assert student["label_set"] == report["labels"]["key"] != wide
    assert LabelStore(str(project_file.parent / "labels")).open(wide).totals().num_samples == 30


def test_training_without_labels_is_refused_and_says_what_to_do(
    project_file: Path, distill: Distill
) -> None:
    failed = distill("train", project_file, expect=2)
    assert "run `distill label` first" in failed.stderr


def test_a_student_that_fails_stops_no_other(project_file: Path, distill: Distill) -> None:
    """Two at once; one of three diverges. The others are published, and the command says so."""
    students = (
        *("--set", "students.soft={loss.weight.soft_weight: 1.0}"),
        *("--set", "cluster.student_threads=1", *FAKE),
    )
    diverging = ("--set", "students.bad={optimizer.lr: 1.0e+30}")
    failed = distill("run", project_file, *students, *diverging, expect=2)
    assert "1 of 3 students could not be trained:\n  bad: " in failed.stderr
    assert "hard, soft trained and published" in failed.stderr
    assert "Traceback" not in failed.stderr
    run_folder = project_file.parent / "runs" / "tiny"
    report = json.loads(distill("report", run_folder, "--json").stdout)
    assert report["state"]["outcome"] == "failed"
    assert report["state"]["step"] == "train"
    assert {s["name"]: s["published"] for s in report["students"]} == {
        "hard": True,
        "soft": True,
        "bad": False,
    }
    logs = [
        json.loads(line)
        for file in (run_folder / report["state"]["logs"]).glob("trainer-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    (error,) = [line for line in logs if line["level"] == "ERROR"]
    assert (error["step"], error["student"]) == ("train", "bad")
    assert "NonFiniteLossError" in error["traceback"]

    done = json.loads(distill("run", project_file, *students, "--json").stdout)
    assert [e["name"] for e in done["evaluations"]] == ["untrained", "hard", "soft"]


def test_two_runs_at_once_share_a_store_and_never_a_run_folder(project_file: Path) -> None:
    """Both label the same samples into one store; a third wants the folder of the first."""

    def start(runs: str) -> subprocess.Popen[str]:
        words = ("label", project_file, *FAKE, "--set", f"runs={project_file.parent / runs}")
        command = [sys.executable, "-m", "pipeline", *map(str, words)]
        return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)

    first, second = start("here"), start("there")
    while not (project_file.parent / "here" / "tiny" / "run.json").is_file():
        assert first.poll() is None
        time.sleep(0.1)
    third = start("here")
    assert f"(process {first.pid} on " in third.communicate()[1]
    assert third.returncode == 2
    for process in (first, second):
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert len(stored_keys(project_file)) == 30
    assert set(stored_keys(project_file).values()) == {1}
