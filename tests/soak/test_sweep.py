"""A sweep of six students from one label set, side by side; and once more, byte for byte."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Distill

SWEEP = (
    *("--set", "teacher.backend={type: fake}", "--set", "students={}"),
    *("--set", "sweep.grid.loss.weight.soft_weight=[0.0, 0.5, 1.0]"),
    *("--set", "sweep.grid.seed=[0, 1]"),
    *("--set", "cluster.student_threads=1"),
)
"""Two at once on two cores."""


@pytest.fixture
def events(project_file: Path) -> Callable[[str], list[dict[str, Any]]]:
    """The events of a run folder, by the name of its parent."""

    def read(runs: str) -> list[dict[str, Any]]:
        lines = (project_file.parent / runs / "tiny" / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return read


def weights(runs: Path) -> dict[str, str]:
    """Digest of every student's weights."""
    return {
        file.parent.parent.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in runs.glob("tiny/students/*/model/*.safetensors")
    }


def test_six_students_from_one_label_set_twice(
    project_file: Path, distill: Distill, events: Callable[[str], list[dict[str, Any]]]
) -> None:
    first = json.loads(distill("run", project_file, *SWEEP, "--json").stdout)
    assert len(first["students"]) == 6
    assert len(first["evaluations"]) == 7
    assert len({e["metrics"]["kl"] for e in first["evaluations"]}) == 7
    assert first["state"]["outcome"] == "finished"
    (trained,) = [e for e in events("runs") if e["event"] == "started" and e["step"] == "train"]
    assert (len(trained["students"]), trained["at_once"]) == (6, 2)
    paid = first["cost_summary"]["teacher_once"]
    assert paid["separate_tokens"] == 6 * paid["needed_tokens"]

    # again: nothing is left to do
    before = len(events("runs"))
    distill("run", project_file, *SWEEP)
    assert [e["event"] for e in events("runs")[before:]] == ["run started", "run ended"]

    # the same labels in another run folder: no teacher, and the same students
    elsewhere = ("--set", f"runs={project_file.parent}/again")
    distill("run", project_file, *SWEEP, *elsewhere)
    steps = {e["step"] for e in events("again") if e["event"] == "started"}
    assert steps == {"train", "evaluate"}
    once, twice = weights(project_file.parent / "runs"), weights(project_file.parent / "again")
    assert len(once) == 6
    assert once == twice
    assert len(set(once.values())) == 6
