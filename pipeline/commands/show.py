"""``distill show``: one label set or one run, with provenance."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.commands.ls import DEFAULT_STORE
from pipeline.commands.options import (
    DEFAULT_RUNS,
    JsonOption,
    RunsOption,
    StoreOption,
    console,
    print_json,
)


def show(
    name: Annotated[
        str,
        typer.Argument(help="Key of a label set (or its beginning), or name of a run."),
    ],
    store: StoreOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    as_json: JsonOption = False,
) -> None:
    """Show what a label set or a run is and where it came from."""
    from rich.pretty import Pretty

    found = describe(name, store or DEFAULT_STORE, runs)
    if as_json:
        print_json(found)
    else:
        console(as_json=False).print(Pretty(found, expand_all=True))


def describe(name: str, store: str, runs: Path) -> dict[str, Any]:
    """A run if one has this name, else a label set.

    Raises:
        LabelStoreError: if there is neither.
    """
    folder = runs / name
    if (folder / "config.json").is_file():
        return {
            "run": name,
            "directory": str(folder.absolute()),
            "config": json.loads((folder / "config.json").read_text()),
            "provenance": json.loads((folder / "provenance.json").read_text()),
            "students": [
                json.loads(file.read_text())
                for file in sorted(folder.glob("students/*/student.json"))
            ],
        }
    from storage.store import LabelStore

    label_set = LabelStore(store).open(name)
    totals = label_set.totals()
    return {
        "label_set": label_set.key,
        "store": store,
        "spec": label_set.spec.model_dump(mode="json"),
        "generation_key": label_set.spec.generation.key,
        "provenance": label_set.document.provenance,
        "totals": {field: getattr(totals, field) for field in totals.__slots__},
        "commits": [
            {
                "number": record.number,
                "created_at": record.created_at,
                "samples": sum(shard.num_samples for shard in record.shards),
                "provenance": record.provenance,
            }
            for record in label_set.refresh()
        ],
    }
