"""Arguments that several commands share, and how they print."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.project import Project

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file of the project.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as train.epochs=2."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", metavar="URI", help="Label store: a path, s3://, gs:// or az://."),
]
RunsOption = Annotated[
    Path, typer.Option("--runs", metavar="DIR", help="Directory of run folders.")
]
DEFAULT_RUNS = Path("runs")


def open_project(config: Path, overrides: list[str] | None, *, as_json: bool) -> "Project":
    """Load a configuration; with ``--json``, progress goes to stderr."""
    from pipeline.config import load_config
    from pipeline.project import Project

    return Project(load_config(config, overrides or ()), console(as_json=as_json))


def console(*, as_json: bool) -> "Console":
    """Where people read.

    With ``--json``, stdout belongs to the document: everything else that this process prints,
    messages of libraries included, goes to stderr.
    """
    from rich.console import Console

    if as_json and sys.stdout is not sys.stderr:
        _data_stream.append(sys.stdout)
        sys.stdout = sys.stderr
    return Console(stderr=as_json)


_data_stream: list[TextIO] = []
"""The real stdout, while it is reserved for the document."""


def print_json(value: Any) -> None:
    """One JSON document on stdout, which is given back."""
    if _data_stream:
        sys.stdout = _data_stream.pop()
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def human_bytes(count: float) -> str:
    """``1234567`` as ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
