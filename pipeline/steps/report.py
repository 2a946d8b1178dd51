"""The report of a run: one self-contained HTML file and the same numbers as JSON."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.project import Project
from pipeline.report.build import build_report
from pipeline.report.folder import CONFIG_FILE
from pipeline.report.found import Found, StudentFolder
from pipeline.report.page import render_report
from pipeline.steps.evaluate import Evaluation
from pipeline.steps.plan import Plan
from pipeline.steps.prepare import PreparedTeacher
from pipeline.steps.train import TrainedStudent
from storage.files import write_atomically

PAGE_FILE, NUMBERS_FILE = "report.html", "report.json"


def write_report(
    project: Project,
    plan: Plan,
    teacher: PreparedTeacher,
    students: Sequence[TrainedStudent],
    evaluations: Sequence[Evaluation],
) -> Path:
    """Write ``report.html`` and ``report.json``; unchanged inputs leave both untouched."""
    found = Found(
        plan=plan,
        tokenizer=Path(teacher.model.directory),
        students=[StudentFolder(s.name, s.directory, s.result) for s in students],
        evaluations=evaluations,
        go_on=shlex.join(("distill", "run", str(project.directory / CONFIG_FILE))),
    )
    return write_found(project, found)


def write_found(project: Project, found: Found) -> Path:
    """Write the report of what is known; unchanged inputs leave both files untouched."""
    path = project.directory / PAGE_FILE
    known = project.read_json(NUMBERS_FILE) if path.is_file() else None
    report = build_report(project, found, known_key=None if known is None else known["key"])
    if report is not None:
        project.write_json(NUMBERS_FILE, report)
        write_atomically(path, render_report(report).encode())
    return path


def remove_report(project: Project) -> None:
    """Let the report be written again, whether anything changed or not."""
    for name in (PAGE_FILE, NUMBERS_FILE):
        (project.directory / name).unlink(missing_ok=True)
