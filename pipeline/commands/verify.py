"""``distill verify``: read every byte of a store."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.commands.options import (
    SHOWN_KEY_DIGITS,
    JsonOption,
    KeyOrAllArgument,
    StoreOption,
    console,
    open_store,
    print_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from storage.label_set import LabelSet
    from storage.store import LabelStore
    from storage.verify import Problem

LOSSES = {
    "spec": "nothing is lost if a shard has a copy of it",
    "record": "what it committed is lost, unless a merged record covers it",
    "merged": "nothing is lost, it is derived",
    "index": "nothing is lost, it can be made anew",
    "sidecar": "its numbers must be computed again",
    "certificate": "no label is lost, the next labelling certifies again",
    "quarantine": "the reason is lost, the next labelling asks for the sample again",
    "selection": "nothing is lost, the next plan makes it anew",
}
"""What is lost with a damaged file that is no shard."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is damaged of one label set."""

    key: str
    spec_error: str | None = None
    """Why the set cannot be opened; its shards are not looked at then."""
    problems: tuple["Problem", ...] = ()

    def rows(self) -> Iterator[dict[str, Any]]:
        """One flat entry per damaged file; none if the set is whole."""
        if self.spec_error is not None:
            path = f"label_sets/{self.key}/spec.json"
            yield self._row("spec", path, self.spec_error, 0)
        for problem in self.problems:
            yield self._row(problem.what, problem.path, problem.error, problem.lost_samples)

    def _row(self, what: str, path: str, error: str, lost_samples: int) -> dict[str, Any]:
        return {
            "label_set": self.key,
            "what": what,
            "path": path,
            "error": error,
            "lost_samples": lost_samples,
        }


def verify(
    key: KeyOrAllArgument = None, store: StoreOption = None, as_json: JsonOption = False
) -> None:
    """Check all checksums, schemas and counts; exit code 2 when anything is damaged."""
    from storage.errors import ShardCorruptError

    opened = open_store(store)
    out = console(as_json=as_json)
    keys = matching_sets(opened, key)
    problems = [row for found in keys for row in examine(opened, found, out).rows()]
    if key is None:
        problems += selection_rows(opened)
    if as_json:
        print_json({"store": opened.uri, "label_sets": keys, "problems": problems})
    if problems:
        listed = "\n  ".join(f"{row['what']}: {row['error']} ({loss(row)})" for row in problems)
        raise ShardCorruptError(
            f"{len(problems)} damaged files in {opened.uri}:\n  {listed}\n"
            f"run `distill repair --store {opened.uri}`"
        )
    if not as_json:
        out.print(f"{len(keys)} label sets verified, nothing is damaged")


def selection_rows(store: "LabelStore") -> list[dict[str, Any]]:
    """One flat entry per damaged selection."""
    return [
        {"label_set": None, "what": "selection", "path": path, "error": error, "lost_samples": 0}
        for path, error in store.damaged_selections().items()
    ]


def loss(row: dict[str, Any]) -> str:
    """What is lost with a damaged file, in words."""
    return LOSSES.get(row["what"], f"{row['lost_samples']} samples are lost")


def matching_sets(store: "LabelStore", key: str | None) -> list[str]:
    """Keys of all label sets, or of the one whose key begins so; damaged ones included.

    Raises:
        LabelStoreError: if no set or several begin so.
    """
    from storage.errors import LabelStoreError

    known = set(store.keys())
    names = store.objects.directories("label_sets")
    known.update(name for name in names if name not in known and _lost_its_spec(store, name))
    matches = sorted(found for found in known if found.startswith(key or ""))
    if key is not None and len(matches) != 1:
        what = "several label sets" if matches else "no label set"
        listed = ", ".join(matches or sorted(known)) or "none"
        raise LabelStoreError(
            f"{what} of store {store.uri!r} match {key!r}; label sets here: {listed}"
        )
    return matches


def _lost_its_spec(store: "LabelStore", key: str) -> bool:
    """Whether a set without a spec serves samples: it was damaged then, and not removed."""
    from storage.log import CommitLog
    from storage.shard_table import names_of
    from storage.verify import DAMAGE

    served: set[str] = set()
    try:
        log = CommitLog(store.objects, f"label_sets/{key}", key)
        for record in log.walk(1):
            served.difference_update(record.removed)
            served.update(names_of(log.shards(record)))
    except (*DAMAGE, FileNotFoundError):
        return True
    return bool(served)


def examine(store: "LabelStore", key: str, out: "Console") -> Finding:
    """Read every byte of one label set, with a progress bar."""
    from pipeline.progress import byte_bar
    from storage.verify import DAMAGE
    from storage.verify import verify as problems_of

    if key not in store.keys():  # noqa: SIM118 - not a mapping
        return Finding(key, f"{store.uri}/label_sets/{key}/spec.json is missing")
    try:
        label_set = store.open(key)
    except DAMAGE as error:
        return Finding(key, str(error))
    bar = f"verifying {key[:SHOWN_KEY_DIGITS]}"
    with byte_bar(out, bar, _num_bytes(label_set)) as advance:
        return Finding(key, problems=tuple(problems_of(label_set, advance=advance)))


def _num_bytes(label_set: "LabelSet") -> int | None:
    """Bytes to read; unknown where the history is damaged."""
    from storage.verify import DAMAGE

    try:
        return label_set.totals().num_bytes
    except DAMAGE:
        return None
