"""``distill diff``: why two label set keys differ, and what that means."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.options import (
    DEFAULT_STORE,
    SHOWN_KEY_DIGITS,
    JsonOption,
    StoreOption,
    console,
    print_json,
)

if TYPE_CHECKING:
    from rich.table import Table

    from storage.keys import LabelSetSpec


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Key of a label set, or its beginning.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Key of another one.")],
    store: StoreOption = None,
    other_store: Annotated[
        str | None,
        typer.Option("--other-store", metavar="URI", help="Store of B, if it is another one."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Explain field by field why two label set keys differ, and whether one serves the other."""
    from storage.store import LabelStore

    first = LabelStore(store or DEFAULT_STORE).open(a)
    second = LabelStore(other_store or store or DEFAULT_STORE).open(b)
    found: dict[str, Any] = {
        "a": first.key,
        "b": second.key,
        "fields": differing_fields(
            first.spec.model_dump(mode="json"), second.spec.model_dump(mode="json")
        ),
        "same_generation_key": first.spec.generation.key == second.spec.generation.key,
        "labels_of_a_for_b": serves(first.spec, second.spec),
        "labels_of_b_for_a": serves(second.spec, first.spec),
        "provenance": differing_fields(first.document.provenance, second.document.provenance),
    }
    if as_json:
        print_json(found)
        return
    out = console(as_json=False)
    names = (f"A {first.key[:SHOWN_KEY_DIGITS]}", f"B {second.key[:SHOWN_KEY_DIGITS]}")
    if found["fields"]:
        out.print(_table("fields of the key that differ", names, found["fields"]))
    for line in _in_words(found):
        out.print(line, highlight=False, soft_wrap=True)
    if found["provenance"]:
        out.print(
            _table("provenance that differs, not part of the key", names, found["provenance"])
        )


def differing_fields(
    a: Mapping[str, Any], b: Mapping[str, Any], *, prefix: str = ""
) -> list[dict[str, Any]]:
    """Every field that differs, with its dotted name and its values.

    Returns:
        ``field``, ``a`` and ``b`` of each; without ``a`` or ``b`` where that side has no such
        field.
    """
    found: list[dict[str, Any]] = []
    for name in {**a, **b}:
        values = {side: tree[name] for side, tree in (("a", a), ("b", b)) if name in tree}
        if len(values) == 2 and values["a"] == values["b"]:
            continue
        if len(values) == 2 and all(isinstance(value, Mapping) for value in values.values()):
            found += differing_fields(values["a"], values["b"], prefix=f"{prefix}{name}.")
        else:
            found.append({"field": f"{prefix}{name}", **values})
    return found


def serves(stored: "LabelSetSpec", wanted: "LabelSetSpec") -> str:
    """What labels of one set are for requests of another: ``hits``, ``upgrades`` or ``nothing``."""
    from storage.narrow import satisfies

    if satisfies(stored, wanted):
        return "hits"
    return "upgrades" if stored.generation == wanted.generation else "nothing"


def _in_words(found: dict[str, Any]) -> list[str]:
    if found["a"] == found["b"]:
        return ["same label set key: both answer the same request"]
    meaning = {
        "hits": "are hits: they hold all that is requested",
        "upgrades": "are upgradable: the responses are the same, the labels hold too little",
        "nothing": "are of no use: the responses are others",
    }
    return [
        "same generation key: both hold responses of the same teacher and sampling"
        if found["same_generation_key"]
        else "other generation keys: teacher, mode or sampling differ",
        f"labels of A for requests of B {meaning[found['labels_of_a_for_b']]}",
        f"labels of B for requests of A {meaning[found['labels_of_b_for_a']]}",
    ]


def _table(title: str, names: tuple[str, str], rows: list[dict[str, Any]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for name in ("field", *names):
        table.add_column(name, overflow="fold")
    for row in rows:
        values = (str(row[side]) if side in row else "(absent)" for side in ("a", "b"))
        table.add_row(row["field"], *(Text(value) for value in values))
    return table
