"""``distill submit``: a run as a job of a cluster."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import (
    ConfigArgument,
    JsonOption,
    SetOption,
    console,
    print_json,
)

AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Ray's dashboard, such as http://head:8265."),
]
WorkingDirOption = Annotated[
    Path,
    typer.Option("--working-dir", metavar="DIR", help="What is uploaded: code, config, prompts."),
]
NoWaitOption = Annotated[bool, typer.Option("--no-wait", help="Do not follow the job.")]


def submit(
    config: ConfigArgument,
    overrides: SetOption = None,
    address: AddressOption = None,
    working_dir: WorkingDirOption = Path(),
    no_wait: NoWaitOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a project as a job of a Ray cluster; ends with the job's exit code."""
    from pipeline.config import load_config
    from pipeline.submit import JobClient, entrypoint, require_lasting_paths

    require_lasting_paths(load_config(config, overrides or ()))
    command = entrypoint(config, overrides or (), working_dir)
    out = console(as_json=as_json)
    client = JobClient(address)

    def started(job: str) -> None:
        out.print(f"job {job}: {command}", highlight=False, soft_wrap=True, markup=False)

    code: int | None = None
    if no_wait:
        started(job := client.submit(command, working_dir))
    else:
        job, code = client.submit_and_follow(
            command,
            working_dir,
            started=started,
            show=lambda text: out.print(text, end="", markup=False),
        )
    if as_json:
        print_json({"job": job, "command": command, "exit_code": code})
    raise typer.Exit(code or 0)
