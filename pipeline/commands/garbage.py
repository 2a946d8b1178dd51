"""``distill gc``: delete files that nothing serves any more."""

import datetime
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.options import (
    SHOWN_KEY_DIGITS,
    Failures,
    JsonOption,
    StoreOption,
    YesOption,
    console,
    open_store,
    print_json,
    show_then_ask,
)
from pipeline.text import human_bytes
from storage.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from storage.garbage import Garbage
    from storage.store import LabelStore

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def gc(
    store: StoreOption = None,
    grace: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="How long a file must have been of no use: 0s, 30m, 24h, 7d."
        ),
    ] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show it, delete nothing.")] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Delete files of superseded shards, removed label sets and writers that died."""
    from storage.garbage import find_garbage

    period = duration(grace)
    opened = open_store(store)
    out = console(as_json=as_json)
    failures = Failures()
    found: list[Garbage] = []
    with out.status("looking for files that nothing serves"):
        for key in opened.objects.directories("label_sets"):
            with failures.noted(key):
                found.append(find_garbage(opened.objects, key, period))
    wanted = [garbage for garbage in found if garbage.paths]
    deleted: list[Garbage] = []
    if wanted and not dry_run:
        show_then_ask(out, _table(found, grace), "Delete these files?", yes=yes)
        deleted = _collect(opened, wanted, out, failures)
    elif not as_json:
        out.print(_table(found, grace))
    if as_json:
        print_json(_document(opened.uri, found, deleted))
    else:
        freed = "nothing was deleted" if dry_run else f"{human_bytes(_num_bytes(deleted))} freed"
        out.print(freed, highlight=False, soft_wrap=True)
    failures.raise_all()


def duration(text: str) -> datetime.timedelta:
    """A time such as ``0s``, ``30m``, ``24h`` or ``7d``.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\d{1,5})([smhd])", text)
    if match is None:
        raise ConfigError(
            f"--grace must be a number and one of s, m, h, d, such as 24h; got {text!r}"
        )
    return datetime.timedelta(**{UNITS[match[2]]: int(match[1])})


def _collect(
    store: "LabelStore", wanted: "list[Garbage]", out: "Console", failures: Failures
) -> "list[Garbage]":
    """Delete it; what was deleted is returned, other failures are noted."""
    from pipeline.progress import byte_bar
    from storage.garbage import collect
    from storage.provenance import provenance

    deleted = []
    with byte_bar(out, "deleting", _num_bytes(wanted)) as advance:
        for garbage in wanted:
            with failures.noted(garbage.label_set):
                collect(store.objects, garbage, provenance(), advance=advance)
                deleted.append(garbage)
    return deleted


def _num_bytes(garbage: "list[Garbage]") -> int:
    return sum(found.num_bytes for found in garbage)


def _table(found: "list[Garbage]", grace: str) -> "Table":
    from rich.table import Table

    table = Table(title="files that nothing serves")
    for title in ("label set", "to delete", "size", f"younger than {grace}"):
        table.add_column(title, justify="left" if title == "label set" else "right")
    for garbage in found:
        table.add_row(
            garbage.label_set[:SHOWN_KEY_DIGITS],
            str(len(garbage.paths)),
            human_bytes(garbage.num_bytes),
            str(garbage.kept_for_now),
        )
    return table


def _document(uri: str, found: "list[Garbage]", deleted: "list[Garbage]") -> dict[str, Any]:
    return {
        "store": uri,
        "label_sets": [
            {
                "label_set": garbage.label_set,
                "files": len(garbage.paths),
                "bytes": garbage.num_bytes,
                "kept_for_now": garbage.kept_for_now,
            }
            for garbage in found
        ],
        "freed_bytes": _num_bytes(deleted),
    }
