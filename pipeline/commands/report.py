"""``distill report``: what is known of a run, at any time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import JsonOption, SetOption, console, open_project, print_json

if TYPE_CHECKING:
    from pipeline.project import Project

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
TargetArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG|RUN_DIR",
        help="YAML file of a project, or its run folder.",
        show_default=False,
    ),
]


def report(
    target: TargetArgument, overrides: SetOption = None, as_json: JsonOption = False
) -> None:
    """Write the report of a run as far as it came, also of a failed one."""
    from pipeline.report.folder import CONFIG_FILE, find_everything, open_run_folder
    from pipeline.steps.report import write_found
    from storage.errors import ConfigError

    go_on = None
    if target.suffix in CONFIG_SUFFIXES and not target.is_dir():
        project = open_project(target, overrides, as_json=as_json)
        settings = [word for override in overrides or () for word in ("--set", override)]
        go_on = ("distill", "run", str(target), *settings)
        if not (project.directory / CONFIG_FILE).is_file():
            raise ConfigError(
                f"{str(project.directory)!r} is no run folder: this project was never run; "
                f"`distill run {target}` starts it"
            )
    elif overrides:
        raise ConfigError("--set changes the settings of a YAML file; a run folder has its own")
    else:
        project = open_run_folder(target, console(as_json=as_json))
    with project.ways_out(), _held(project) as live:
        path = write_found(project, find_everything(project, live=live, go_on=go_on))
    written = project.read_json("report.json")
    if as_json:
        print_json(written)
        return
    state = written["state"]
    at = f" at step {state['step']}" if state["step"] else ""
    project.say(f"{project.config.name}: {state['outcome']}{at}")
    logs = state["logs"] and f"logs: {project.directory / state['logs']}"
    for line in (state["why"], state["go_on"] and f"go on with: {state['go_on']}", logs):
        if line:
            project.console.print(line, markup=False, highlight=False, soft_wrap=True)
    project.console.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _held(project: "Project") -> Iterator[bool]:
    """Whether another process works in the run folder; if none does, none begins in the block."""
    from filelock import FileLock, Timeout

    lock = FileLock(project.directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield True
        return
    try:
        yield False
    finally:
        lock.release()
