"""``distill pack``: one archive of a label set, to be carried elsewhere."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from pipeline.commands.options import (
    SHOWN_KEY_DIGITS,
    JsonOption,
    KeyArgument,
    StoreOption,
    console,
    open_store,
    print_json,
)
from pipeline.text import human_bytes
from storage.errors import ConfigError

STDOUT = "-"


def pack(
    key: KeyArgument,
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A path, - for stdout, or s3://...")
    ],
    store: StoreOption = None,
    licence: Annotated[
        str | None, typer.Option("--licence", metavar="TEXT", help="Licence of the labels.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a label set to one archive, for ``distill unpack``."""
    from rich.console import Console

    from pipeline.progress import byte_bar
    from storage.pack import pack as pack_set
    from storage.provenance import provenance

    if target == STDOUT:
        _require_stdout_for_the_archive(as_json=as_json)
    label_set = open_store(store).open(key)
    # the archive goes to the real stdout: everything else stays away from it
    out = Console(stderr=True) if target == STDOUT else console(as_json=as_json)
    bar = f"packing {label_set.key[:SHOWN_KEY_DIGITS]}"
    with byte_bar(out, bar, label_set.totals().num_bytes) as advance:
        done = pack_set(label_set, target, provenance(), licence=licence, advance=advance)
    if as_json:
        print_json({"target": target, **asdict(done)})
    else:
        out.print(
            f"{done.num_samples} samples with {done.num_tokens} tokens of label set {done.key} "
            f"in {'stdout' if target == STDOUT else target}, {human_bytes(done.num_bytes)}",
            highlight=False,
            soft_wrap=True,
        )


def _require_stdout_for_the_archive(*, as_json: bool) -> None:
    """Refuse to mix the archive with anything else.

    Raises:
        ConfigError: if a document or a terminal would get in between.
    """
    if as_json:
        raise ConfigError("the archive takes stdout: with the target - leave out --json")
    if sys.stdout.isatty():
        raise ConfigError("stdout is a terminal: give the archive a path, or pipe it somewhere")
