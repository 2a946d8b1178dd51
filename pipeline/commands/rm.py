"""``distill rm``: remove label sets."""

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import (
    SHOWN_KEY_DIGITS,
    JsonOption,
    StoreOption,
    YesOption,
    console,
    open_store,
    print_json,
    show_then_ask,
)
from pipeline.text import human_bytes, kind_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from storage.label_set import LabelSet


def rm(
    keys: Annotated[
        list[str],
        typer.Argument(metavar="KEY...", help="Label set keys, or unique beginnings of them."),
    ],
    store: StoreOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove label sets; their files stay until ``distill gc`` deletes them."""
    from storage.garbage import drop
    from storage.provenance import provenance

    opened = open_store(store)
    out = console(as_json=as_json)
    found = {label_set.key: label_set for label_set in map(opened.open, keys)}
    show_then_ask(out, _table(found.values()), f"Remove {len(found)} label sets?", yes=yes)
    for label_set in found.values():
        drop(label_set, provenance())
    if as_json:
        print_json({"store": opened.uri, "removed": list(found)})
    else:
        out.print(
            "removed; `distill gc` frees the bytes after the grace period",
            highlight=False,
            soft_wrap=True,
        )


def _table(label_sets: "Iterable[LabelSet]") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title="label sets to remove")
    for title in ("key", "labels", "samples", "tokens", "size", "teacher"):
        table.add_column(title)
    for label_set in label_sets:
        totals = label_set.totals()
        table.add_row(
            label_set.key[:SHOWN_KEY_DIGITS],
            kind_text(label_set.spec),
            str(totals.num_samples),
            str(totals.num_tokens),
            human_bytes(totals.num_bytes),
            Text(label_set.document.provenance.get("teacher", "")),
        )
    return table
