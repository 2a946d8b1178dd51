"""``distill preflight``: do the students fit the labels, before anything is trained or labelled?"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import (
    ConfigArgument,
    JsonOption,
    SetOption,
    open_project,
    print_json,
)

if TYPE_CHECKING:
    from rich.table import Table

    from student_train.preflight.findings import Finding
    from student_train.preflight.self_test import SelfTest

SelfTestOption = Annotated[
    bool,
    typer.Option(
        "--self-test",
        help="Also take the teacher as its own student, whose loss on its labels must be near 0.",
    ),
]
StudentOption = Annotated[
    str | None, typer.Option("--student", metavar="NAME", help="Only this student.")
]


def preflight(
    config: ConfigArgument,
    overrides: SetOption = None,
    self_test: SelfTestOption = False,
    student: StudentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that students and labels fit, with or without labels; trains and labels nothing."""
    from pipeline.preflight import check_student, chosen_requests, self_test_labels
    from pipeline.run import labelled_plan
    from student_train.errors import PreflightError

    project = open_project(config, overrides, as_json=as_json)
    with project.running():
        teacher, plan = labelled_plan(project)
        requests = chosen_requests(project, teacher, student)
        found = {r.name: check_student(project, r, teacher, plan) for r in requests}
        if not as_json:
            for name, findings in found.items():
                project.console.print(_table(name, findings))
        tested = self_test_labels(project, requests[0], teacher, plan) if self_test else None
    if as_json:
        document = {
            "label_set": plan.spec.key,
            "students": {name: [asdict(f) for f in findings] for name, findings in found.items()},
            **({} if tested is None else {"self_test": asdict(tested)}),
        }
        print_json(document)
    elif tested is not None:
        project.console.print(_self_test_table(tested))
    refused = [name for name, findings in found.items() if _is_refused(findings)]
    if refused:
        raise PreflightError(f"refused: {', '.join(refused)}; the sentences above say what to do")
    if tested is not None:
        tested.require_passed()


def _is_refused(findings: "list[Finding]") -> bool:
    return any(finding.verdict == "refused" for finding in findings)


def _table(name: str, findings: "list[Finding]") -> "Table":
    from rich.table import Table

    table = Table(title=f"student {name}")
    for title in ("check", "verdict", "finding"):
        table.add_column(title)
    for finding in findings:
        table.add_row(finding.check, finding.verdict, finding.sentence)
    return table


def _self_test_table(tested: "SelfTest") -> "Table":
    from rich.table import Table

    table = Table(
        title=f"the teacher as its own student: {tested.num_samples} samples, {tested.num_rows} "
        f"tokens, {tested.dtype}; cross-entropy {tested.cross_entropy:.4f} nats, stored "
        f"{tested.teacher_cross_entropy:.4f}"
    )
    for title in ("measure", "mean (nats)", "at most", "verdict"):
        table.add_column(title, justify="left" if title in ("measure", "verdict") else "right")
    for found in tested.measured:
        verdict = "ok" if found.passed else "failed"
        table.add_row(found.name, f"{found.value:.2e}", f"{found.tolerance:g}", verdict)
    return table
