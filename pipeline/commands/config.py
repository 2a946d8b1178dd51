"""``distill config``: check a configuration, or print its JSON schema."""

from typing import Annotated

import typer

from pipeline.commands.options import ConfigArgument, SetOption, print_json

app = typer.Typer(help="Check a configuration, or print the schema for editors.")


@app.command()
def schema(
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="File to write; stdout by default.")
    ] = None,
) -> None:
    """Print the JSON schema of the YAML file, for completion and checks in editors."""
    import json
    from pathlib import Path

    from pipeline.config import RunConfig

    document = RunConfig.model_json_schema()
    if output is None:
        print_json(document)
    else:
        Path(output).write_text(json.dumps(document, indent=1) + "\n")


@app.command()
def show(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Check a configuration and print it with all defaults filled in."""
    from pipeline.config import load_config

    loaded = load_config(config, overrides or ())
    students = {
        name: train.model_dump(mode="json") for name, train in loaded.student_configs().items()
    }
    print_json({**loaded.model_dump(mode="json"), "students": students})
