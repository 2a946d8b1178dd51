"""The report of a run: one self-contained HTML file and the same numbers as JSON."""

import importlib.resources
import json
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from pipeline.project import Project
from pipeline.steps.evaluate import Evaluation
from pipeline.steps.plan import Plan
from pipeline.steps.prepare import PreparedTeacher
from pipeline.steps.train import TrainedStudent
from storage.files import write_atomically
from storage.keys import key_of
from storage.samples import LabelledSample
from storage.tokenizer import TokenDecoder
from storage.view import LabelView
from student_train.config import METRICS_FILE

TOP_TOKENS = 5


def write_report(
    project: Project,
    plan: Plan,
    teacher: PreparedTeacher,
    students: Sequence[TrainedStudent],
    evaluations: Sequence[Evaluation],
) -> Path:
    """Write ``report.html`` and ``report.json``; unchanged inputs leave both untouched."""
    costs = _costs(project)
    key = key_of(
        {
            "label_set": plan.spec.key,
            "selections": plan.selection_keys,
            "students": [student.key for student in students],
            "evaluations": [[e.name, e.result["metrics"]] for e in evaluations],
            "costs": costs,
        }
    )
    path = project.directory / "report.html"
    known = project.read_json("report.json")
    if known is not None and known["key"] == key and path.is_file():
        return path
    report = {
        "key": key,
        "project": project.config.name,
        "labels": _labels(project, plan),
        "costs": costs,
        "students": [_student(student) for student in students],
        "evaluations": [{"name": e.name, **e.result} for e in evaluations],
        "response": _response(project, plan, teacher),
        "provenance": project.read_json("provenance.json"),
        "config": project.config.model_dump(mode="json"),
    }
    project.write_json("report.json", report)
    write_atomically(path, render_report(report).encode())
    return path


def render_report(report: dict[str, Any]) -> str:
    """The HTML page of a report; every text in it is escaped."""
    text = importlib.resources.files("pipeline").joinpath("report.html.jinja").read_text()
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    # "<" inside the embedded JSON would let a token end the script element
    data = json.dumps(report, allow_nan=False).replace("<", "\\u003c")
    return template.render(report=report, data=data)


def _labels(project: Project, plan: Plan) -> dict[str, Any]:
    return {
        "key": plan.spec.key,
        "store": project.store_uri,
        "k": plan.spec.kind.width,
        "mode": plan.spec.generation.mode,
        "samples": {name: len(s.requests) for name, s in plan.selections.items()},
        "selections": plan.selection_keys,
        **_stored(project.store.view(plan.spec), [request.key for request in plan.requests()]),
        "skipped_rows": list(plan.skipped_rows),
    }


def _stored(view: LabelView, keys: list[str]) -> dict[str, Any]:
    """Sizes of the samples that a project reads, and the label sets in which they lie.

    The bytes of a set are shared out evenly over its tokens.
    """
    served_by: dict[str, int] = {}
    num_tokens, num_bytes = 0, 0.0
    for label_set in view.sets:
        there = label_set.contains(keys).tolist()
        mine = list(compress(keys, there))
        keys = [key for key, found in zip(keys, there, strict=True) if not found]
        if mine:
            totals = label_set.totals()
            tokens = int(label_set.locate(mine).entries.num_tokens.sum())
            served_by[label_set.key] = len(mine)
            num_tokens += tokens
            num_bytes += totals.num_bytes * tokens / totals.num_tokens
    return {
        "served_by": served_by,
        "stored_samples": sum(served_by.values()),
        "stored_tokens": num_tokens,
        "stored_bytes": round(num_bytes),
    }


def _costs(project: Project) -> list[dict[str, Any]]:
    """One row per finished step of all runs of this project, in order."""
    return [
        {
            "step": event["step"],
            "what": ", ".join(
                event.get("students") or event.get("models") or [event.get("model", "")]
            ),
            "seconds": event["seconds"],
            "teacher_forward_tokens": event.get("teacher_forward_tokens", 0),
            "trained_tokens": event.get("trained_tokens", 0),
        }
        for event in project.events()
        if event["event"] == "finished"
    ]


def _student(student: TrainedStudent) -> dict[str, Any]:
    lines = (student.directory / METRICS_FILE).read_text().splitlines()
    return {
        **student.result,
        "directory": str(student.directory),
        "curve": [
            {name: m[name] for name in ("step", "loss", "soft", "hard")}
            for m in map(json.loads, lines)
        ],
    }


def _response(project: Project, plan: Plan, teacher: PreparedTeacher) -> dict[str, Any] | None:
    """One held-out response, token by token: entropy, and the likeliest tokens."""
    requests = plan.selections["heldout"].requests or plan.selections["train"].requests
    if not requests:
        return None
    samples = project.store.view(plan.spec).read([request.key for request in requests[:8]])
    sample = max(samples, key=lambda s: len(s.positions_N))
    decoder = TokenDecoder(Path(teacher.model.directory))
    return {
        "sample_key": sample.key,
        "prompt": decoder.text(sample.prompt_ids_P.tolist()),
        "tokens": [_token(sample, decoder, n) for n in range(len(sample.positions_N))],
    }


def _token(sample: LabelledSample, decoder: TokenDecoder, n: int) -> dict[str, Any]:
    top = zip(sample.topk_ids_NK[n], sample.topk_logprobs_NK[n], strict=True)
    entropy = None if sample.entropy_N is None else round(float(sample.entropy_N[n]), 4)
    return {
        "text": decoder.token(int(sample.token_ids_N[n])),
        "entropy": entropy,
        "probability": float(np.exp(sample.token_logprob_N[n])),
        "rank": int(sample.token_rank_N[n]),
        "tail_mass": float(np.exp(sample.log_tail_mass_N[n])),
        "top": [
            {"text": decoder.token(int(token)), "probability": float(np.exp(logprob))}
            for (token, logprob), _ in zip(top, range(TOP_TOKENS), strict=False)
        ],
    }
