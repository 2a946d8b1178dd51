"""Drop label sets, and delete files that nothing serves any more.

A file goes when it was superseded, or left behind by a writer that died, for longer than a grace
period by the store's own clock. Before anything is deleted, the names are announced in the
history: a writer that was about to commit one of those files loses the race for its record
number, reads the announcement and writes the file anew.
"""

import datetime
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from storage.label_set import LabelSet
from storage.log import CommitLog, is_dropped
from storage.objects import Objects
from storage.provenance import utc_now
from storage.records import CommitRecord, Name
from storage.shard_table import names_of
from storage.writer import publish

ANNOUNCED_FOLDERS = ("shards", "index")
"""Folders of a label set whose files are named by records."""

FOLDERS_OF_A_SET = ("sidecars", "quarantine", "certificates")
"""Folders whose files are needed as long as the label set is."""

DEFAULT_GRACE = datetime.timedelta(hours=24)


def drop(label_set: LabelSet, provenance: dict[str, str]) -> None:
    """Remove a label set from its store; its files are deleted later, by :func:`collect`.

    Readers that are at work keep their files for the grace period. A writer that is at work makes
    the set anew with what it adds from now on.

    Raises:
        LabelStoreError: if the store cannot be written.
    """
    # in this order, a writer that comes in between is dropped with the rest, not lost from sight
    label_set.objects.delete(f"{label_set.prefix}/spec.json")
    record = None
    while record is None:
        names = [shard.name for shard in label_set.live_shards()]
        record = publish(label_set, [], removed=names, dropped=True, provenance=provenance)


@dataclass(frozen=True, slots=True)
class Garbage:
    """Files of one label set that may go."""

    label_set: str
    paths: dict[str, int]
    """Path and size in bytes."""
    kept_for_now: int
    """Files that nothing serves, still within the grace period."""

    @property
    def num_bytes(self) -> int:
        """What deleting them frees."""
        return sum(self.paths.values())


def find_garbage(objects: Objects, key: str, grace: datetime.timedelta) -> Garbage:
    """Files of a label set that nothing has served for longer than the grace period.

    Works for dropped sets too, whose spec is gone.

    Raises:
        FormatError: if the history cannot be read; nothing may be deleted then.
    """
    prefix = f"label_sets/{key}"
    log = CommitLog(objects, prefix, key)
    records = list(log.walk(1))
    needed = _needed(log, records)
    unneeded = [
        entry
        for folder in ANNOUNCED_FOLDERS
        for entry in objects.entries(f"{prefix}/{folder}")
        if _name(entry[0]) not in needed
    ]
    if is_dropped(records):
        for folder in FOLDERS_OF_A_SET:
            unneeded += objects.entries(f"{prefix}/{folder}")
    superseded = _superseded(objects, prefix, log) if unneeded else {}
    oldest = objects.now() - grace
    paths: dict[str, int] = {}
    kept = 0
    for path, size, created in unneeded:
        if max(created, superseded.get(_name(path), created)) <= oldest:
            paths[path] = size
        else:
            kept += 1
    for path, size, created in objects.unfinished(prefix):
        if created <= oldest:
            paths[path] = size
    return Garbage(key, paths, kept)


def _superseded(objects: Objects, prefix: str, log: CommitLog) -> dict[Name, datetime.datetime]:
    """When shards and indexes stopped to be needed, by the store's clock."""
    since: dict[Name, datetime.datetime] = {}
    created = {path: time for path, _, time in objects.entries(f"{prefix}/commits")}
    for record in log.singles():
        if record.removed:
            since.update(dict.fromkeys(record.removed, created[log.path(record.first)]))
    for path, _, time in sorted(objects.entries(f"{prefix}/merged"), key=lambda entry: entry[2]):
        first, last = log.range_of(path)
        for record in _covered(log, first, last):
            for name in record.index_names:
                since.setdefault(name, time)
    return since


def _covered(log: CommitLog, first: int, last: int) -> Iterator[CommitRecord]:
    """Records that a merged one makes superfluous: single ones, and merged ones of a part."""
    for number in range(first, last + 1):
        record = log.single(number)
        if record is not None:
            yield record
    for start, end in map(log.range_of, log.merged_paths()):
        if first <= start and end <= last and (start, end) != (first, last):
            yield log.merged(start, end)


def collect(
    objects: Objects,
    garbage: Garbage,
    provenance: dict[str, str],
    *,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """Delete what :func:`find_garbage` found.

    Raises:
        LabelStoreError: if the store cannot be written; what is left is found again next time.
    """
    names = _announce(objects, garbage, provenance)
    for path, size in garbage.paths.items():
        if not _is_announced(path) or _name(path) in names:
            objects.delete(path)
        advance(size)


def _announce(objects: Objects, garbage: Garbage, provenance: dict[str, str]) -> set[Name]:
    """Say in the history which names go; returns those that nobody has committed meanwhile."""
    names = {_name(path) for path in garbage.paths if _is_announced(path)}
    log = CommitLog(objects, f"label_sets/{garbage.label_set}", garbage.label_set)
    while True:
        records = list(log.walk(1))
        names -= _needed(log, records)
        number = records[-1].last + 1 if records else 1
        record = CommitRecord(
            label_set=garbage.label_set,
            first=number,
            last=number,
            deleted=tuple(sorted(names)),
            created_at=utc_now(),
            provenance=provenance,
        )
        if not names or log.create(record):
            return names


def _needed(log: CommitLog, records: Iterable[CommitRecord]) -> set[Name]:
    """Names of the shards and indexes that a reader of these records opens."""
    needed: set[Name] = set()
    for record in records:
        needed.difference_update(record.removed)
        needed.update(names_of(log.shards(record)))
        needed.update(record.index_names)
    return needed


def _is_announced(path: str) -> bool:
    """Whether a writer might be about to commit the file; nobody commits half-written ones."""
    return "#" not in path and path.split("/")[2] in ANNOUNCED_FOLDERS


def _name(path: str) -> Name:
    """The name of a shard or index by the path of a file."""
    return path.rpartition("/")[2].partition(".")[0]
