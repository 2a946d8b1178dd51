"""``distill status``: how runs are doing, from any machine that sees the store."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import (
    JsonOption,
    SetOption,
    StoreOption,
    console,
    open_project,
    open_store,
    print_json,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pipeline.status import RunStatus, StepStatus

ProjectArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[PROJECT]", help="Name of a project or its YAML file; all projects by default."
    ),
]
WatchOption = Annotated[bool, typer.Option("--watch", help="Show it anew until the runs end.")]
WATCH_EVERY_S = 2.0


def status(
    project: ProjectArgument = None,
    overrides: SetOption = None,
    store: StoreOption = None,
    watch: WatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show every step of the runs of a store: live, ended, failed or silent."""
    from pathlib import Path

    from pipeline.status import statuses
    from storage.errors import ConfigError

    if project is not None and project.endswith((".yaml", ".yml")):
        config = open_project(Path(project), overrides, as_json=as_json).config
        project, store = config.name, store or config.store
    if watch and as_json:
        raise ConfigError("--watch and --json contradict each other; use one")
    objects = open_store(store).objects
    found = statuses(objects, project)
    if project is not None and not found:
        known = ", ".join(sorted({run.project for run in statuses(objects)})) or "none"
        raise ConfigError(
            f"no run of project {project!r} in store {objects.uri!r}; runs of: {known}"
        )
    if as_json:
        print_json([{**run.model_dump(), "silent": run.is_silent()} for run in found])
        return
    out = console(as_json=False)
    if not watch:
        out.print(_shown(found))
        return
    from rich.live import Live

    with Live(_shown(found), console=out) as live:
        while any(run.state == "running" and not run.is_silent() for run in found):
            time.sleep(WATCH_EVERY_S)
            found = statuses(objects, project)
            live.update(_shown(found))


def _shown(runs: "list[RunStatus]") -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    if not runs:
        return Text("no runs yet")
    return Group(*(part for run in runs for part in (_headline(run), _steps(run))))


def _headline(run: "RunStatus") -> "RenderableType":
    from rich.text import Text

    state = f"silent since {run.heard_at}" if run.is_silent() else run.state
    return Text(
        f"{run.project}: {state}, started {run.started_at}; "
        f"process {run.process} on {run.host} in {run.directory}"
    )


def _steps(run: "RunStatus") -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for title in ("step", "state", "started", "seconds", "progress", "note"):
        table.add_column(title, overflow="fold")
    for name, step in run.steps.items():
        state = "interrupted" if step.state == "running" and run.state != "running" else step.state
        seconds = "" if step.seconds is None else f"{step.seconds:.1f}"
        table.add_row(name, state, step.started_at, seconds, _progress(step), Text(step.note))
    return table


def _progress(step: "StepStatus") -> str:
    if step.completed is None:
        return ""
    return str(step.completed) if step.total is None else f"{step.completed}/{step.total}"
