"""``distill ls``: label sets and runs."""

import json
from pathlib import Path
from typing import Any

from pipeline.commands.options import (
    DEFAULT_RUNS,
    JsonOption,
    RunsOption,
    StoreOption,
    console,
    human_bytes,
    print_json,
)

DEFAULT_STORE = "labels"
SHOWN_KEY_DIGITS = 12
"""Enough to tell keys apart; `show` and `verify` take any unique beginning."""


def ls(
    store: StoreOption = None, runs: RunsOption = DEFAULT_RUNS, as_json: JsonOption = False
) -> None:
    """List label sets of a store and run folders of a directory."""
    from rich.table import Table

    uri = store or DEFAULT_STORE
    found: dict[str, Any] = {"store": uri, "label_sets": label_sets(uri), "runs": run_folders(runs)}
    if as_json:
        print_json(found)
        return
    out = console(as_json=False)
    table = Table(title=f"label sets in {uri}")
    for title in ("key", "mode", "k", "samples", "tokens", "size", "commits", "teacher"):
        table.add_column(title, no_wrap=title != "teacher")
    for entry in found["label_sets"]:
        table.add_row(
            entry["key"][:SHOWN_KEY_DIGITS],
            entry["mode"],
            str(entry["k"]),
            str(entry["samples"]),
            str(entry["tokens"]),
            human_bytes(entry["bytes"]),
            str(entry["commits"]),
            entry["teacher"],
        )
    out.print(table)
    table = Table(title=f"runs in {runs}")
    for title in ("run", "students", "report", "directory"):
        table.add_column(title)
    for entry in found["runs"]:
        table.add_row(
            entry["name"], ", ".join(entry["students"]), entry["report"] or "-", entry["directory"]
        )
    out.print(table)


def label_sets(uri: str) -> list[dict[str, Any]]:
    """One entry per label set of a store."""
    from storage.store import LabelStore

    opened = LabelStore(uri)
    entries = []
    for key in opened.keys():  # noqa: SIM118 - not a mapping
        label_set = opened.open(key)
        totals = label_set.totals()
        entries.append(
            {
                "key": key,
                "mode": label_set.spec.generation.mode,
                "k": label_set.spec.kind.k,
                "samples": totals.num_samples,
                "tokens": totals.num_tokens,
                "bytes": totals.num_bytes,
                "commits": totals.num_commits,
                "teacher": label_set.document.provenance.get("teacher", ""),
            }
        )
    return entries


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
