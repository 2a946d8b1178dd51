"""``distill ls``: label sets and runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.options import (
    DEFAULT_RUNS,
    DEFAULT_STORE,
    SHOWN_KEY_DIGITS,
    JsonOption,
    RunsOption,
    StoreOption,
    console,
    print_json,
)
from pipeline.text import human_bytes, kind_text

if TYPE_CHECKING:
    from rich.table import Table

    from storage.store import LabelStore


def ls(
    store: StoreOption = None, runs: RunsOption = DEFAULT_RUNS, as_json: JsonOption = False
) -> None:
    """List label sets of a store and run folders of a directory."""
    uri = store or DEFAULT_STORE
    found: dict[str, Any] = {"store": uri, "label_sets": label_sets(uri), "runs": run_folders(runs)}
    if as_json:
        print_json(found)
        return
    out = console(as_json=False)
    out.print(_label_set_table(uri, found["label_sets"]))
    for entry in found["label_sets"]:
        if "error" in entry:
            out.print(
                f"{entry['key']}: {entry['error']}", style="red", markup=False, soft_wrap=True
            )
    out.print(_run_table(runs, found["runs"]))


def _label_set_table(uri: str, entries: list[dict[str, Any]]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"label sets in {uri}", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("key", no_wrap=True, min_width=SHOWN_KEY_DIGITS)
    table.add_column("labels")
    for title in ("samples", "tokens", "size", "shards"):
        table.add_column(title, no_wrap=True, justify="right")
    table.add_column("teacher", overflow="fold")
    for entry in entries:
        key = entry["key"][:SHOWN_KEY_DIGITS]
        if "error" in entry:
            table.add_row(key, Text("damaged", "red"))
            continue
        table.add_row(
            *(key, f"{entry['mode']} {entry['kind']}"),
            *(str(entry["samples"]), str(entry["tokens"]), human_bytes(entry["bytes"])),
            *(f"{entry['shards']} in {entry['partitions']}", Text(entry["teacher"])),
        )
    table.caption = "shards: how many, in how many partitions" if entries else None
    return table


def _run_table(runs: Path, entries: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table(title=f"runs in {runs}")
    for title in ("run", "students", "report", "directory"):
        table.add_column(title)
    for entry in entries:
        table.add_row(
            entry["name"], ", ".join(entry["students"]), entry["report"] or "-", entry["directory"]
        )
    return table


def label_sets(uri: str) -> list[dict[str, Any]]:
    """One entry per label set of a store; of a damaged one its key and ``error``."""
    from storage.errors import LabelStoreError
    from storage.store import LabelStore

    opened = LabelStore(uri)
    entries = []
    for key in opened.keys():  # noqa: SIM118 - not a mapping
        try:
            entries.append(_entry(opened, key))
        except LabelStoreError as error:
            entries.append({"key": key, "error": str(error)})
    return entries


def _entry(store: "LabelStore", key: str) -> dict[str, Any]:
    label_set = store.open(key)
    totals = label_set.totals()
    return {
        "key": key,
        "mode": label_set.spec.generation.mode,
        "kind": kind_text(label_set.spec),
        "samples": totals.num_samples,
        "tokens": totals.num_tokens,
        "bytes": totals.num_bytes,
        "commits": totals.num_commits,
        "shards": totals.num_shards,
        "partitions": totals.num_partitions,
        "teacher": label_set.document.provenance.get("teacher", ""),
    }


def run_folders(runs: Path) -> list[dict[str, Any]]:
    """One entry per run folder."""
    entries = []
    for config in sorted(runs.glob("*/config.json")):
        folder = config.parent
        students = [
            json.loads(file.read_text())["name"]
            for file in sorted(folder.glob("students/*/student.json"))
        ]
        report = folder / "report.html"
        entries.append(
            {
                "name": json.loads(config.read_text())["name"],
                "directory": str(folder),
                "students": students,
                "report": str(report) if report.is_file() else None,
            }
        )
    return entries
