"""A whole project of tiny models under real Ray: label, train with DeepSpeed, evaluate, report."""

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from storage.store import LabelStore

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
