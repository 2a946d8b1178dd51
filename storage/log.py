"""The history of a label set: numbered commit records that every writer agrees on.

``commits/00000001.json`` and so on are created with put-if-absent, so of two writers that want a
number one wins, and the other reads what won and tries the next. Every ``MERGE_FACTOR`` records
are summed up in a merged record, every ``MERGE_FACTOR`` of those again, and so on: a reader needs
few documents however long the history is. Merged records are derived and may be absent.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from storage.errors import FormatError, ShardCorruptError, WrongLabelSetError
from storage.objects import Objects
from storage.records import CommitRecord, ShardRecord, parse, to_json
from storage.shard_table import read_shard_table

MERGE_FACTOR = 16


class CommitLog:
    """Reads and extends one history.

    Args:
        objects: The store's objects.
        prefix: Folder of the label set.
        key: Its label set key.
    """

    def __init__(self, objects: Objects, prefix: str, key: str) -> None:
        self._objects, self._prefix, self._key = objects, prefix, key
        self.last = 0
        """Number of the last record that was read."""
        self.num_single = 0
        """Records that were read one by one, although merged ones may exist by now."""

    def refresh(self) -> Iterator[CommitRecord]:
        """Records that appeared since the last call, oldest first.

        Raises:
            FormatError: if a record is malformed or a number is missing.
            WrongLabelSetError: if a record belongs to another set.
            ShardCorruptError: if a record is damaged.
        """
        late = self.last > 0
        for record in self.walk(self.last + 1):
            self.last = record.last
            self.num_single += late
            yield record

    def walk(self, first: int, last: int | None = None) -> Iterator[CommitRecord]:
        """The fewest records that cover ``first`` to ``last`` (all there are by default)."""
        # merged records and gaps are looked for once; what follows comes one by one
        thorough = first == 1 or last is not None
        merged = self._merged(first) if thorough else {}
        while last is None or first <= last:
            ends = [end for end in merged.get(first, ()) if last is None or end <= last]
            record = self._longest(first, ends) or self.single(first)
            if record is None and thorough:
                record = self._in_gap(first)
            if record is None:
                return
            yield record
            first = record.last + 1

    def _longest(self, first: int, ends: list[int]) -> CommitRecord | None:
        """The longest merged record that can be read; they are derived, so damage is no loss."""
        for end in sorted(ends, reverse=True):
            with contextlib.suppress(FormatError, ShardCorruptError):
                record = self._read(first, end)
                if record is not None:
                    return record
        return None

    def single(self, number: int) -> CommitRecord | None:
        """One record as its writer made it, or what replaces a damaged one; None if absent."""
        try:
            return self._read(number)
        except (FormatError, ShardCorruptError):
            replacement = self._read(number, number)
            if replacement is None:
                raise
            return replacement

    def effective(self, number: int) -> CommitRecord | None:
        """One record, or what replaces a damaged or absent one; None behind the end.

        Raises:
            FormatError, ShardCorruptError: if it is damaged, or absent before the end, and
                nothing replaces it.
        """
        return self.single(number) or self._in_gap(number)

    def singles(self) -> Iterator[CommitRecord]:
        """Every record as its writer made it, oldest first."""
        for number in count(1):
            record = self.effective(number)
            if record is None:
                return
            yield record

    def create(self, record: CommitRecord, *, merged: bool = False) -> bool:
        """Add the next record to the history, or a merged one beside it.

        Returns:
            False if another writer was faster.
        """
        data = to_json(record)
        path = self.path(record.first, record.last if merged else None)
        # a request whose answer was lost is sent again and then finds its own record
        return self._objects.create(path, data) or self._objects.get(path) == data

    def path(self, first: int, last: int | None = None) -> str:
        """Where a record lies; with ``last``, a merged one."""
        if last is None:
            return f"{self._prefix}/commits/{first:08d}.json"
        return f"{self._prefix}/merged/{first:08d}-{last:08d}.json"

    def merged_paths(self) -> list[str]:
        """Paths of all merged records."""
        return list(self._objects.paths(f"{self._prefix}/merged"))

    def merged(self, first: int, last: int) -> CommitRecord:
        """A merged record that exists.

        Raises:
            FormatError: if it does not, or is malformed.
            ShardCorruptError: if it is damaged.
        """
        record = self._read(first, last)
        if record is None:
            raise FormatError(f"{self._objects.uri}/{self.path(first, last)} has vanished")
        return record

    def shards(self, record: CommitRecord) -> Sequence[ShardRecord]:
        """The shards that a record adds.

        Raises:
            FileNotFoundError: if the table of a merged record does not exist.
            ShardCorruptError: if it is damaged.
        """
        if record.merged_shards is None:
            return record.shards
        return read_shard_table(self._objects, self._prefix, record.merged_shards)

    @staticmethod
    def range_of(path: str) -> tuple[int, int]:
        """First and last number of the merged record at a path."""
        first, _, last = path.rpartition("/")[2].removesuffix(".json").partition("-")
        return int(first), int(last)

    def end(self) -> int:
        """Number of the last record that exists, damaged or not."""
        names = self._objects.paths(f"{self._prefix}/commits")
        return max(
            (int(path.rpartition("/")[2].removesuffix(".json")) for path in names), default=0
        )

    def _merged(self, first: int) -> dict[int, list[int]]:
        """Merged ranges from ``first`` on: ends by their first number."""
        ranges: dict[int, list[int]] = {}
        for start, end in map(self.range_of, self.merged_paths()):
            if start >= first:
                ranges.setdefault(start, []).append(end)
        return ranges

    def _read(self, first: int, last: int | None = None) -> CommitRecord | None:
        path = self.path(first, last)
        name = f"{self._objects.uri}/{path}"
        try:
            data = self._objects.get(path)
        except FileNotFoundError:
            return None
        record = parse(CommitRecord, data, name=name)
        if (record.first, record.last) != (first, last or first):
            raise FormatError(
                f"{name}: wanted record {first} to {last or first}, found {record.first} to "
                f"{record.last}; a record was removed or renamed"
            )
        if record.label_set != self._key:
            raise WrongLabelSetError(
                f"{name} belongs to label set {record.label_set}, not {self._key}"
            )
        return record

    def _in_gap(self, number: int) -> CommitRecord | None:
        """What replaces an absent record; None where the history ends.

        Raises:
            FormatError: if later records exist and nothing replaces this one.
        """
        path = self.path(number)
        behind = next(self._objects.paths(f"{self._prefix}/commits", after=path), None)
        if behind is None:
            return None
        # it may have appeared meanwhile
        record = self._read(number) or self._read(number, number)
        if record is None:
            raise FormatError(
                f"{self._objects.uri}/{path} is missing although {behind!r} exists; "
                "a record was removed or renamed: run `distill repair`"
            )
        return record


def merge_ranges(last: int) -> Iterator[tuple[int, int]]:
    """Ranges of records that are due to be merged once record ``last`` exists."""
    span = MERGE_FACTOR
    while last % span == 0:
        yield last - span + 1, last
        span *= MERGE_FACTOR


def is_dropped(records: Iterable[CommitRecord], *, before: bool = False) -> bool:
    """Whether the set was dropped, ``before`` or by these records, and nothing was added since."""
    dropped = before
    for record in records:
        dropped = record.dropped or (dropped and not record.num_shards)
    return dropped
