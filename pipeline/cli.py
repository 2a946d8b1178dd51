"""The command ``distill``.

Exit codes: 0 done, 2 a problem the user can fix, 1 a bug, 143 stopped in good order by SIGTERM.
"""

import importlib
import os
import sys
from collections.abc import Sequence

import typer

from pipeline.commands import COMMANDS
from pipeline.layout import EXTRA_OF, check_layout, install_command
from pipeline.manners import QUIET_ENVIRONMENT
from pipeline.stopping import EXIT_CODE, StoppedError
from storage.errors import DistillError


def build_app() -> typer.Typer:
    """The application with every command of the table."""
    app = typer.Typer(
        name="distill",
        help="Run a teacher once, keep its labels, distil many students from them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for name, target in COMMANDS.items():
        module, attribute = target.split(":")
        command = getattr(importlib.import_module(module), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    check_layout()
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        build_app()(args=argv, prog_name="distill")
    except StoppedError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CODE
    except DistillError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        fix = install_command(error.name)
        sys.stderr.write(f"error: this command needs the package {error.name}: {fix}\n")
        return 2
    except SystemExit as ended:  # how typer reports success, wrong usage and interruption
        return ended.code if isinstance(ended.code, int) else 0
    return 0
