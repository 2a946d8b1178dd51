"""``distill repair``: take what is damaged out of service."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.commands.options import (
    SHOWN_KEY_DIGITS,
    Failures,
    JsonOption,
    KeyOrAllArgument,
    StoreOption,
    YesOption,
    console,
    open_store,
    print_json,
    show_then_ask,
)
from pipeline.commands.verify import Finding, examine, loss, matching_sets, selection_rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from storage.store import LabelStore

ACTIONS = {
    "spec": "write it anew from the copy in a shard, then repair what else is damaged",
    "record": "replace it by an empty record",
    "merged": "delete it",
    "index": "make it anew from its shards",
    "shard": "take it out of service",
    "sidecar": "give it up",
    "certificate": "delete it; if it is the newest, the older ones too",
    "quarantine": "delete it",
    "selection": "delete it",
}


def repair(
    key: KeyOrAllArgument = None,
    store: StoreOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Verify, then take damaged files out of service; only what they held is labelled again."""
    opened = open_store(store)
    out = console(as_json=as_json)
    findings = [examine(opened, found, out) for found in matching_sets(opened, key)]
    damaged = [finding for finding in findings if list(finding.rows())]
    selections = selection_rows(opened) if key is None else []
    repaired: list[dict[str, Any]] = []
    failures = Failures()
    if damaged or selections:
        show_then_ask(out, _table(damaged, selections), "Do this?", yes=yes)
        for row in selections:
            opened.objects.delete(row["path"])
        for finding in damaged:
            with failures.noted(finding.key):
                repaired.append(_repair(opened, finding, out))
    if as_json:
        deleted = [row["path"] for row in selections]
        print_json({"store": opened.uri, "repaired": repaired, "deleted_selections": deleted})
    else:
        out.print(
            _in_words(repaired) if damaged or selections else "nothing is damaged",
            highlight=False,
            soft_wrap=True,
        )
    failures.raise_all()


def _repair(store: "LabelStore", finding: Finding, out: "Console") -> dict[str, Any]:
    from storage.provenance import provenance
    from storage.repair import repair as repair_problems
    from storage.repair import restore_spec

    facts, problems = provenance(), finding.problems
    if finding.spec_error is not None:
        restore_spec(store.objects, finding.key, facts)
        problems = examine(store, finding.key, out).problems
    done = repair_problems(store.open(finding.key), problems, facts)
    return {
        "label_set": finding.key,
        "spec_restored": finding.spec_error is not None,
        **asdict(done),
    }


def _table(damaged: list[Finding], selections: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table(title="damaged files")
    for title in ("label set", "file", "what will be done", "what is lost"):
        table.add_column(title, overflow="fold")
    for finding in damaged:
        for row in finding.rows():
            name = row["path"].removeprefix(f"label_sets/{finding.key}/")
            table.add_row(finding.key[:SHOWN_KEY_DIGITS], name, ACTIONS[row["what"]], loss(row))
    for row in selections:
        table.add_row("", row["path"], ACTIONS[row["what"]], loss(row))
    return table


def _in_words(repaired: list[dict[str, Any]]) -> str:
    shards = [name for done in repaired for name in done["quarantined"]]
    lost = sum(done["lost_samples"] for done in repaired)
    lines = [f"{len(repaired)} label sets repaired"]
    if shards:
        lines.append(f"out of service: {', '.join(shards)}")
        lines.append(f"{lost} samples are lost; the next `distill label` asks for exactly those")
    return "\n".join(lines)
