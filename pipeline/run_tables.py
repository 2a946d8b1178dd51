"""Run folders as tables: their students with settings, losses and evaluations, for SQL."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.errors import ConfigError

RUNS_SCHEMA = pa.schema(
    [
        pa.field("run", pa.string()),
        pa.field("directory", pa.string()),
        pa.field("student", pa.string()),
        pa.field("student_key", pa.string()),
        pa.field("label_set", pa.string()),
        pa.field("selection", pa.string()),
        pa.field("loss", pa.string()),
        pa.field("settings", pa.string()),
        pa.field("steps", pa.int64()),
        pa.field("trained_tokens", pa.int64()),
        pa.field("train_s", pa.float64()),
        pa.field("final_loss", pa.float64()),
        pa.field("evaluation", pa.string()),
        pa.field("evaluated_tokens", pa.int64()),
        pa.field("kl", pa.float64()),
        pa.field("cross_entropy", pa.float64()),
        pa.field("agreement", pa.float64()),
        pa.field("label_s", pa.float64()),
        pa.field("teacher_forward_tokens", pa.int64()),
        pa.field("response_tokens", pa.int64()),
    ]
)
"""One row per model of a run and evaluation of it; ``untrained`` is a model before training.
``settings`` is JSON. The last three are of the run: seconds on the clock and tokens of its
labelling."""

STEPS_SCHEMA = pa.schema(
    [
        pa.field("run", pa.string()),
        pa.field("student", pa.string()),
        pa.field("student_key", pa.string()),
        pa.field("step", pa.int64()),
        *(
            pa.field(name, pa.float64())
            for name in (
                *("lr", "loss", "soft", "hard", "soft_weight", "agreement", "overlap"),
                *("student_topk_mass", "teacher_topk_mass", "grad_norm", "t"),
                *("seconds", "tokens_per_s", "data_wait_share", "memory_gib"),
            )
        ),
        pa.field("supervised_tokens", pa.int64()),
        pa.field("tokens", pa.int64()),
    ]
)
"""One row per optimiser step that a student's training noted."""

METRICS = ("kl", "cross_entropy", "agreement")
LABEL_COSTS = {
    "label_s": "seconds",
    "teacher_forward_tokens": "teacher_forward_tokens",
    "response_tokens": "response_tokens",
}
"""Columns of a run and the facts of its finished labelling that they add up."""


def run_tables(runs: Path) -> dict[str, pa.Table]:
    """The tables ``runs`` and ``steps`` of all run folders of a directory.

    Raises:
        ConfigError: if a file of a run cannot be read.
    """
    folders = [config.parent for config in sorted(runs.glob("*/config.json"))]
    models = [row for folder in folders for row in _models(folder)]
    steps = [row for folder in folders for row in _steps(folder)]
    return {
        "runs": pa.Table.from_pylist(models, schema=RUNS_SCHEMA),
        "steps": pa.Table.from_pylist(steps, schema=STEPS_SCHEMA),
    }


def model_directories(runs: Path) -> list[Path]:
    """Models in run folders, which may hold the tokenizer of a teacher."""
    return [path.parent for path in sorted(runs.glob("*/models/*/tokenizer.json"))] + [
        path.parent for path in sorted(runs.glob("*/students/*/model/tokenizer.json"))
    ]


def _models(folder: Path) -> Iterator[dict[str, Any]]:
    run = {"run": folder.name, "directory": str(folder), **_label_costs(folder)}
    for file in sorted(folder.glob("untrained/*/evaluation-*.json")):
        yield {**run, "student": "untrained", **_evaluation(file)}
    for file in sorted(folder.glob("students/*/student.json")):
        result = _read(file)
        student = {
            **run,
            "student": result["name"],
            "student_key": result["key"],
            "label_set": result.get("label_set"),
            "selection": result.get("selection"),
            "loss": result["train"]["loss"]["type"],
            "settings": json.dumps(result["train"]),
            "steps": result["steps"],
            "trained_tokens": result["trained_tokens"],
            "train_s": result["seconds"],
            "final_loss": result["final"].get("loss"),
        }
        evaluations = sorted(file.parent.glob("evaluation-*.json"))
        for evaluation in evaluations:
            yield {**student, **_evaluation(evaluation)}
        if not evaluations:
            yield student


def _evaluation(file: Path) -> dict[str, Any]:
    found = _read(file)
    return {
        "evaluation": file.stem.removeprefix("evaluation-"),
        "evaluated_tokens": found["num_tokens"],
        **{name: found["metrics"].get(name) for name in METRICS},
    }


def _label_costs(folder: Path) -> dict[str, float]:
    events = folder / "events.jsonl"
    done = [
        event
        for event in (_lines(events) if events.is_file() else ())
        if event["event"] == "finished" and event.get("step") == "label"
    ]
    return {name: sum(e.get(fact, 0) for e in done) for name, fact in LABEL_COSTS.items()}


def _steps(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("students/*/metrics.jsonl")):
        name, _, key = file.parent.name.rpartition("-")
        for entry in _lines(file):
            yield {"run": folder.name, "student": name, "student_key": key, **entry}


def _lines(file: Path) -> list[dict[str, Any]]:
    """The documents of a JSONL file; a last line that is being written is left out."""
    *lines, _unfinished = file.read_text(encoding="utf-8").split("\n")
    return [_parse(line, file) for line in lines if line.strip()]


def _read(file: Path) -> dict[str, Any]:
    return _parse(file.read_text(encoding="utf-8"), file)


def _parse(text: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{str(file)!r} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{str(file)!r} is damaged: an object was expected, found {text[:40]!r}")
    return found
