"""``distill verify``: read every byte of a store."""

from typing import Annotated

import typer

from pipeline.commands.ls import DEFAULT_STORE
from pipeline.commands.options import JsonOption, StoreOption, console, print_json


def verify(
    key: Annotated[
        str | None, typer.Argument(help="Label set key (or its beginning); all sets by default.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check all checksums, schemas and counts; exit code 2 when anything is damaged."""
    from rich.progress import track

    from storage.errors import LabelStoreError, ShardCorruptError
    from storage.store import LabelStore

    uri = store or DEFAULT_STORE
    opened = LabelStore(uri)
    if not opened.objects.exists:
        raise LabelStoreError(f"store {uri!r} does not exist")
    out = console(as_json=as_json)
    keys = opened.keys() if key is None else [opened.open(key).key]
    problems = []
    for found in track(keys, description="verifying", console=out):
        label_set = opened.open(found)
        for problem in label_set.verify():
            problems.append(
                {
                    "label_set": found,
                    "path": problem.path,
                    "error": problem.error,
                    "lost_samples": problem.lost_samples,
                }
            )
    if as_json:
        print_json({"store": uri, "label_sets": keys, "problems": problems})
    if problems:
        listed = "\n  ".join(str(problem["error"]) for problem in problems)
        raise ShardCorruptError(f"{len(problems)} damaged files in {uri}:\n  {listed}")
    if not as_json:
        out.print(f"{len(keys)} label sets verified, nothing is damaged")
