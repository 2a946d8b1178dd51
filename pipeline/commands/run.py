"""``distill run``: the whole project."""

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
from pipeline.wanted import Step, choose_steps

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.preview import StepPreview

OnlyOption = Annotated[
    Step | None, typer.Option("--only", help="Do this step alone; its inputs must be there.")
]
FromOption = Annotated[
    Step | None, typer.Option("--from", help="Start with this step; its inputs must be there.")
]
ForceOption = Annotated[
    list[Step] | None,
    typer.Option("--force", help="Do this step again though it is published; may be repeated."),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what would be done; no label, training or report."),
]


def run(
    config: ConfigArgument,
    overrides: SetOption = None,
    only: OnlyOption = None,
    first: FromOption = None,
    force: ForceOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Plan, label, train, evaluate and report; whatever is published already is skipped."""
    from pipeline.preview import preview
    from pipeline.run import quality_table, run_project

    steps = choose_steps(only, first, force)
    project = open_project(config, overrides, as_json=as_json)
    with project.running():
        if dry_run:
            entries = preview(project, steps)
        else:
            result = run_project(project, steps)
    if dry_run:
        if as_json:
            print_json([asdict(entry) for entry in entries])
        else:
            project.console.print(_preview_table(entries))
        return
    if as_json:
        print_json(project.read_json("report.json"))
        return
    if result.evaluations:
        project.console.print(quality_table(result.evaluations))
    report = project.directory / "report.html"
    places = {
        "labels": f"{project.store_uri} (label set {result.plan.spec.key})",
        "run folder": project.directory,
        **{f"student {s.name}": s.model for s in result.students},
        **({"report": report} if report.is_file() else {}),
    }
    for what, where in places.items():
        project.console.print(f"{what}: {where}", soft_wrap=True, highlight=False)


def _preview_table(entries: "list[StepPreview]") -> "Table":
    from rich.table import Table

    table = Table(title="what a run would do")
    for title in ("step", "done", "to do"):
        table.add_column(title, overflow="fold")
    for entry in entries:
        table.add_row(entry.step, ", ".join(entry.done) or "-", ", ".join(entry.to_do) or "-")
    return table
