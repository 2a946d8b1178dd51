"""``distill compact``: few large shards instead of many small ones."""

from dataclasses import asdict
from typing import Any

from pipeline.commands.options import (
    SHOWN_KEY_DIGITS,
    Failures,
    JsonOption,
    KeyOrAllArgument,
    StoreOption,
    console,
    open_store,
    print_json,
)


def compact(
    key: KeyOrAllArgument = None, store: StoreOption = None, as_json: JsonOption = False
) -> None:
    """Rewrite small shards as large ones; readers and writers may go on meanwhile."""
    from pipeline.progress import byte_bar
    from storage.compact import compact as compact_set
    from storage.provenance import provenance

    opened = open_store(store)
    out = console(as_json=as_json)
    compacted: list[dict[str, Any]] = []
    failures = Failures()
    for found in opened.keys() if key is None else [opened.open(key).key]:
        bar = f"compacting {found[:SHOWN_KEY_DIGITS]}"
        with failures.noted(found), byte_bar(out, bar, None) as advance:
            done = compact_set(opened.open(found), provenance(), advance=advance)
            compacted.append({"label_set": found, **asdict(done)})
    if as_json:
        print_json({"store": opened.uri, "label_sets": compacted})
    else:
        for entry in compacted:
            out.print(_in_words(entry), highlight=False, soft_wrap=True)
    failures.raise_all()


def _in_words(entry: dict[str, Any]) -> str:
    key = entry["label_set"][:SHOWN_KEY_DIGITS]
    if entry["shards_before"] == 0:
        return f"{key}: nothing to compact"
    return (
        f"{key}: {entry['shards_before']} shards became {entry['shards_after']}, "
        f"{entry['num_copies']} copies of samples dropped; "
        "`distill gc` deletes the old files after the grace period"
    )
