"""All numbers of a report, from what is known of a run."""

import math
from collections.abc import Callable
from typing import Any

from pipeline.project import Project
from pipeline.report.certificates import certificate_facts
from pipeline.report.costs import cost_rows, cost_summary
from pipeline.report.found import Found
from pipeline.report.labels import (
    PROMPT_TAIL,
    label_facts,
    longest_response,
    owners,
    stored_requests,
)
from pipeline.report.positions import position_shares
from pipeline.report.samples import MeasuredStudent, by_key, sample_lists
from pipeline.report.state import run_state
from pipeline.steps.plan import Plan
from storage.errors import DistillError
from storage.keys import key_of
from storage.tokenizer import TokenDecoder
from storage.view import LabelView

VERSION = 3
"""Raised when the same run gives another report."""

Report = dict[str, Any]


def build_report(project: Project, found: Found, *, known_key: str | None = None) -> Report | None:
    """The report; None if nothing changed since the one with ``known_key``.

    Args:
        project: The project.
        found: What is known of its run.
        known_key: Of the report that is there.
    """
    report = _without_labels(project, found)
    missing: dict[str, str] = report["missing"]
    view = None
    if found.plan is not None:
        try:
            view = project.store.view(found.plan.spec)
            facts = label_facts(project, found.plan, view)
            served = view.serving([request.key for request in found.plan.requests()])
            report |= {"labels": facts, "certificates": certificate_facts(served)}
        except (DistillError, OSError) as error:
            missing["labels"] = f"the labels cannot be read: {error}"
    labels = report["labels"]
    asked = 0 if found.plan is None else len(found.plan.requests())
    lacking = 0 if labels is None else asked - labels["stored_samples"]
    unlabelled = [f"labels of {lacking} of {asked} samples"] if lacking else []
    if found.plan is None and not found.trained:
        unlabelled = ["labels"]
    report["state"] = run_state(
        project.events(),
        live=found.live,
        missing=[*unlabelled, *_unfinished(found)],
        go_on=found.go_on,
        own_run=project.run_id,
    )
    published = [student for student in report["students"] if student["published"]]
    report["cost_summary"] = cost_summary(report["costs"], published, report["evaluations"], labels)
    report["key"] = _key(report)
    if report["key"] == known_key:
        return None
    if view is not None and labels is not None and found.plan is not None:
        try:
            _read_labels(project, found, found.plan, view, report)
        except (DistillError, OSError) as error:
            missing["labels"] = f"some labels cannot be read: {error}"
    _explain(report, found)
    return report


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for, such as the loss of a diverged run.

    Args:
        value: Anything that JSON can hold.
    """
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_labels(project: Project, found: Found) -> Report:
    """What stands in the run folder."""
    report: Report = finite(_of_folder(project, found))
    return report


def _of_folder(project: Project, found: Found) -> Report:
    return {
        "key": "",
        "project": project.config.name,
        "state": None,
        "missing": dict(found.missing),
        "labels": None,
        "certificates": [],
        "positions": None,
        "costs": cost_rows(project.events(), project.config),
        "cost_summary": None,
        "students": [student.facts() for student in found.students],
        "evaluations": [
            {"name": e.name, **{n: value for n, value in e.result.items() if n != "samples"}}
            for e in found.evaluations
        ],
        "samples": None,
        "response": None,
        "provenance": project.read_json("provenance.json"),
        "config": project.config.model_dump(mode="json"),
    }


def _key(report: Report) -> str:
    """Digest of all that decides a report; provenance and settings come with it."""
    parts = ("state", "missing", "labels", "certificates", "costs")
    students = [[s["name"], s.get("key", ""), s["steps"]] for s in report["students"]]
    evaluations = [[e["name"], e["metrics"], e["num_tokens"]] for e in report["evaluations"]]
    return key_of(
        {
            "version": VERSION,
            "students": students,
            "evaluations": evaluations,
            **{part: report[part] for part in parts},
        }
    )


def _unfinished(found: Found) -> list[str]:
    """What the settings ask for behind labelling, and is not there."""
    lacking = [f"student {student.name}" for student in found.students if student.result is None]
    if found.plan is not None and found.plan.selections["heldout"].requests:
        measured = {evaluation.name for evaluation in found.evaluations}
        lacking += [
            f"evaluation of {student.name}"
            for student in found.trained
            if student.name not in measured
        ]
    return lacking


def _read_labels(
    project: Project, found: Found, plan: Plan, view: LabelView, report: Report
) -> None:
    """The parts that are made from labels themselves."""
    split = "heldout" if plan.selections["heldout"].requests else "train"
    requests = stored_requests(view, plan.selections[split].requests)
    keys = sorted(request.key for request in requests)  # digests: their order says nothing
    shares = position_shares(view.read(keys), of_samples=len(keys)) if keys else None
    report["positions"] = None if shares is None else {"split": split, **shares}
    if found.tokenizer is not None:
        report["response"] = longest_response(project, plan, found.tokenizer, requests)
    evaluated = {e.name: by_key(e.result) for e in found.evaluations}
    measured = []
    for student in found.trained:
        samples = evaluated.get(student.name)
        if samples is not None:
            untrained = found.baseline(student)
            baseline = None if untrained is None else by_key(untrained.result)
            directory = str(student.directory)
            measured.append(MeasuredStudent(student.name, directory, samples, baseline))
    if measured:
        report["samples"] = sample_lists(
            measured,
            store=project.store_uri,
            owner=owners(view, keys),
            prompt=_prompts(found, plan),
        )


def _prompts(found: Found, plan: Plan) -> Callable[[str], str | None]:
    """The end of a prompt as text, by sample key."""
    prompts = {request.key: request.prompt_ids_P for request in plan.requests()}
    decoder = None if found.tokenizer is None else TokenDecoder(found.tokenizer)

    def text(key: str) -> str | None:
        return None if decoder is None else decoder.text(prompts[key].tolist()[-PROMPT_TAIL:])

    return text


def _explain(report: Report, found: Found) -> None:
    """Say why a part is missing, where that is not said yet."""
    labels = report["missing"].get("labels")
    heldout = found.plan is not None and bool(found.plan.selections["heldout"].requests)
    old = any("samples" not in e.result for e in found.evaluations)
    reasons = {
        "evaluations": "no model was measured yet"
        if heldout
        else labels or "the project has no held-out prompts",
        "students": "no student was trained",
        "costs": "no step has ended yet",
        "certificates": labels or "no labels are stored yet",
        "positions": labels or "no labels are stored yet",
        "response": labels or "no labels are stored yet",
        "samples": (
            "these evaluations were made before samples were measured one by one; "
            "`distill run CONFIG --force evaluate` measures them"
            if old
            else labels or "no student was measured yet"
        ),
    }
    for part, reason in reasons.items():
        if not report[part]:
            report["missing"].setdefault(part, reason)
