"""``distill show``: one label set or one run, with provenance."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.options import (
    DEFAULT_RUNS,
    DEFAULT_STORE,
    JsonOption,
    RunsOption,
    StoreOption,
    console,
    print_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from storage.label_set import LabelSet
    from storage.log import CommitLog

SHOWN_COMMITS = 20


def show(
    name: Annotated[
        str,
        typer.Argument(help="Key of a label set (or its beginning), or name of a run."),
    ],
    store: StoreOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    commits: Annotated[
        int, typer.Option("--commits", metavar="N", min=0, help="Show the last N commits.")
    ] = SHOWN_COMMITS,
    as_json: JsonOption = False,
) -> None:
    """Show what a label set or a run is and where it came from."""
    from rich.pretty import Pretty

    folder = runs / name
    is_run = (folder / "config.json").is_file()
    found = (
        describe_run(name, folder)
        if is_run
        else describe_label_set(name, store or DEFAULT_STORE, commits)
    )
    if as_json:
        print_json(found)
        return
    out = console(as_json=False)
    out.print(Pretty({n: v for n, v in found.items() if n != "certificate"}, expand_all=True))
    if not is_run:
        show_certificate(found["certificate"], out)


def describe_run(name: str, folder: Path) -> dict[str, Any]:
    """A run by its folder."""
    students = sorted(folder.glob("students/*/student.json"))
    return {
        "run": name,
        "directory": str(folder.absolute()),
        "config": json.loads((folder / "config.json").read_text()),
        "provenance": json.loads((folder / "provenance.json").read_text()),
        "students": [json.loads(file.read_text()) for file in students],
    }


def describe_label_set(key: str, store: str, num_commits: int) -> dict[str, Any]:
    """A label set by its key or a unique beginning of it, with its certificate and last commits.

    Raises:
        LabelStoreError: if there is none, or it is damaged.
    """
    from storage.store import LabelStore

    label_set = LabelStore(store).open(key)
    totals = label_set.totals()
    return {
        "label_set": label_set.key,
        "store": store,
        "spec": label_set.spec.model_dump(mode="json"),
        "generation_key": label_set.spec.generation.key,
        "provenance": label_set.document.provenance,
        "totals": {field: getattr(totals, field) for field in totals.__slots__},
        "certificate": describe_certificate(label_set),
        "quarantined": quarantined(label_set),
        "commits": last_commits(label_set.log, num_commits),
    }


def describe_certificate(label_set: "LabelSet") -> dict[str, Any] | None:
    """The newest certificate and whether it is ``current``; of a damaged one its ``error``."""
    from storage.certificate import is_current, newest_certificate
    from storage.errors import LabelStoreError

    try:
        found = newest_certificate(label_set)
    except LabelStoreError as error:
        return {"error": str(error)}
    if found is None:
        return None
    return {**found.model_dump(mode="json"), "current": is_current(label_set, found)}


def show_certificate(described: dict[str, Any] | None, out: "Console") -> None:
    """A described certificate for people."""
    if described is None:
        out.print("certificate: none, make one with `distill certify`", soft_wrap=True)
        return
    from pipeline.commands.certify import print_certificate
    from storage.certificate import Certificate

    if "error" in described:
        out.print(f"certificate: {described['error']}", soft_wrap=True, markup=False)
        return
    document = {name: value for name, value in described.items() if name != "current"}
    print_certificate(Certificate.model_validate(document), out, is_current=described["current"])


def quarantined(label_set: "LabelSet") -> list[dict[str, Any]]:
    """Samples that could not be labelled and why; of a damaged entry its ``error``."""
    from storage.errors import LabelStoreError
    from storage.quarantine import Quarantine

    try:
        found = Quarantine(label_set).samples()
    except LabelStoreError as error:
        return [{"error": str(error)}]
    shown = {"sample", "reason", "detail", "created_at"}
    return [sample.model_dump(mode="json", include=shown) for sample in found]


def last_commits(log: "CommitLog", count: int) -> list[dict[str, Any]]:
    """The last commits of a refreshed history, oldest first; of a damaged one its ``error``."""
    from storage.errors import LabelStoreError

    entries: list[dict[str, Any]] = []
    for number in range(max(1, log.last - count + 1), log.last + 1):
        try:
            record = log.single(number)
        except LabelStoreError as error:
            entries.append({"number": number, "error": str(error)})
            continue
        if record is not None:
            entries.append(
                {
                    "number": number,
                    "created_at": record.created_at,
                    "samples": record.num_samples,
                    "shards": len(record.shards),
                    "removed_shards": len(record.removed),
                    "dropped": record.dropped,
                    "provenance": record.provenance,
                }
            )
    return entries
