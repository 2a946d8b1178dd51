"""Which samples a label set holds, and where: planning never opens a shard.

Every commit record has an index file of its samples, sorted by key; merged records have a few
large ones for all of theirs. A lookup goes through the few records that cover the history and
searches their indexes by bisection, batch by batch. Of the shards themselves it reads nothing,
unless one of them was removed or somebody asks where a sample lies.
"""

from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.errors import ShardCorruptError
from storage.index import INDEX_SCHEMA, KEY_COLUMNS, Bools, Entries, concat, parse_keys
from storage.ipc import ArrowFile
from storage.partitions import Keys
from storage.records import CommitRecord, IndexRecord, Name, ShardRecord
from storage.shard_table import names_of, since_of

HELD_SAMPLES = 2**21
"""Samples whose index batches stay in memory (about 40 bytes each)."""

OPEN_FILES = 4
"""Index files that stay open."""

RANGE_SAMPLES = 2**21
"""About how many entries are sorted at a time; it takes some 300 MB."""

Columns = dict[str, npt.NDArray[Any]]
"""Columns of a batch of an index file, as they are stored."""


class _Segment:
    """The shards that one record added, and the batches of the index files that find them.

    Args:
        record: A record that adds shards.
        first: Place of its first shard in the history.
        shards: The shards, read when they are first needed.
    """

    def __init__(
        self, record: CommitRecord, first: int, shards: Callable[[], Sequence[ShardRecord]]
    ) -> None:
        self.last = record.last
        self.first, self.num_shards = first, record.num_shards
        self.alive = np.ones(record.num_shards, dtype=np.bool_)
        self.num_alive = record.num_shards
        self.batches = [
            (file, number) for file in record.indexes for number in range(len(file.first_keys))
        ]
        first_keys = list(chain.from_iterable(file.first_keys for file in record.indexes))
        self.first_hi = parse_keys(first_keys)[:, 0]
        self._read = shards
        self._shards: Sequence[ShardRecord] | None = None
        self._since: npt.NDArray[np.int64] | None = None

    @property
    def shards(self) -> Sequence[ShardRecord]:
        """Its shards, in the order in which its indexes number them."""
        if self._shards is None:
            self._shards = self._read()
        return self._shards

    @property
    def since(self) -> npt.NDArray[np.int64]:
        """int64[S]: of its shards; of two copies of a sample the lower one is served."""
        if self._since is None:
            self._since = since_of(self.shards)
        return self._since

    @property
    def is_whole(self) -> bool:
        """Whether all of its shards are served."""
        return self.num_alive == self.num_shards

    def remove(self, number: int) -> None:
        """Serve a shard no longer."""
        self.num_alive -= int(self.alive[number])
        self.alive[number] = False

    def batches_of(self, hi: npt.NDArray[np.uint64]) -> list[tuple[int, slice]]:
        """Numbers of the batches that may hold some of the ascending ``hi``, with those."""
        starts = np.searchsorted(hi, self.first_hi, side="left")
        # a batch may end with the half key with which the next one begins
        ends = np.append(np.searchsorted(hi, self.first_hi[1:], side="right"), len(hi))
        wanted = np.flatnonzero(starts < ends)
        spans = zip(wanted.tolist(), starts[wanted].tolist(), ends[wanted].tolist(), strict=True)
        return [(number, slice(start, end)) for number, start, end in spans]

    def batches_between(self, low: int, high: int) -> range:
        """Numbers of the batches that may hold half keys from ``low`` to below ``high``."""
        first = np.searchsorted(self.first_hi, np.uint64(low), side="left") - 1
        stop = (
            len(self.batches)
            if high >= 2**64
            else np.searchsorted(self.first_hi, np.uint64(high), side="left")
        )
        return range(max(0, int(first)), int(stop))


@dataclass(frozen=True, slots=True)
class Located:
    """Where N keys lie."""

    found: Bools
    """bool[N]: whether the set holds the key; the entries of the others are meaningless."""
    entries: Entries
    """In the order of the keys; ``shard`` is the place of the shard in the history."""


class SampleIndex:
    """The index files that cover a history.

    Args:
        open_index: Opens an index file; told whether most of it will be read.
        read_shards: The shards that a record adds.
    """

    def __init__(
        self,
        open_index: Callable[[IndexRecord, bool], ArrowFile],
        read_shards: Callable[[CommitRecord], Sequence[ShardRecord]],
    ) -> None:
        self._open, self._read_shards = open_index, read_shards
        self._files: OrderedDict[str, ArrowFile] = OrderedDict()
        self._segments: list[_Segment] = []
        self._starts: list[int] = []
        self._held: OrderedDict[tuple[str, int, tuple[str, ...]], Columns] = OrderedDict()
        self._held_samples = 0
        self._removals: list[tuple[int, tuple[Name, ...]]] = []
        self._place_of: dict[Name, tuple[_Segment, int]] = {}
        self._num_placed = 0
        self.num_shards = 0
        """Shards that were ever added, served or not."""

    def add(self, record: CommitRecord) -> None:
        """Take up the next record of the history; reads nothing."""
        if record.removed:
            self._removals.append((len(self._segments), record.removed))
        if record.num_shards:
            read = self._read_shards
            self._segments.append(_Segment(record, self.num_shards, lambda: read(record)))
            self._starts.append(self.num_shards)
            self.num_shards += record.num_shards

    def _settle(self) -> None:
        """Take removed shards out of service; only now their places are looked up."""
        while self._removals:
            num_segments, names = self._removals[0]
            for segment in self._segments[self._num_placed : num_segments]:
                places = enumerate(names_of(segment.shards))
                self._place_of.update((name, (segment, number)) for number, name in places)
                self._num_placed += 1
            for name in names:
                if name in self._place_of:
                    segment, number = self._place_of.pop(name)
                    segment.remove(number)
            self._removals.pop(0)

    # -- shards -----------------------------------------------------------------------------------
    def shard(self, place: int) -> ShardRecord:
        """A shard by its place in the history."""
        segment = self._segments[bisect_right(self._starts, place) - 1]
        return segment.shards[place - segment.first]

    @property
    def alive(self) -> Bools:
        """bool[S]: whether each shard of the history is served."""
        self._settle()
        return np.concatenate([np.zeros(0, np.bool_), *(s.alive for s in self._segments)])

    @property
    def shards(self) -> list[ShardRecord]:
        """Every shard that was ever added, in the order of their commits."""
        return [shard for segment in self._segments for shard in segment.shards]

    @property
    def live_shards(self) -> list[ShardRecord]:
        """Shards that are served, in the order of their commits."""
        self._settle()
        return [
            shard
            for segment in self._segments
            if segment.num_alive
            for shard, alive in zip(segment.shards, segment.alive.tolist(), strict=True)
            if alive
        ]

    # -- lookups ----------------------------------------------------------------------------------
    def contains(self, keys: Keys, *, after: int = 0) -> Bools:
        """bool[N]: which of the keys the set holds, as far as records behind ``after`` know."""
        order, ascending = _in_order(keys)
        found = np.zeros(len(keys), dtype=np.bool_)
        for segment in self._live_segments(after):
            columns = KEY_COLUMNS if segment.is_whole else (*KEY_COLUMNS, "shard")
            for batch, span in self._batches_of(segment, ascending, columns):
                for asked, rows in _matches(batch, ascending[span]):
                    if not segment.is_whole:
                        asked = asked[segment.alive[batch["shard"][rows]]]
                    found[span.start + asked] = True
        result = np.empty_like(found)
        result[order] = found
        return result

    def locate(self, keys: Keys) -> Located:
        """Where the keys lie."""
        order, ascending = _in_order(keys)
        best = np.full(len(keys), np.iinfo(np.int64).max)
        entries = Entries(ascending, *(np.full(len(keys), -1, np.int32) for _ in range(5)))
        for segment in self._live_segments():
            for batch, span in self._batches_of(segment, ascending, tuple(INDEX_SCHEMA.names)):
                for matching, rows in _matches(batch, ascending[span]):
                    shard, asked = batch["shard"][rows], matching + span.start
                    better = segment.alive[shard] & (segment.since[shard] < best[asked])
                    asked, rows, shard = asked[better], rows[better], shard[better]
                    best[asked] = segment.since[shard]
                    entries.shard[asked] = shard + np.int32(segment.first)
                    for name in INDEX_SCHEMA.names[3:]:
                        getattr(entries, name)[asked] = batch[name][rows]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return Located(entries.shard[back] >= 0, entries.take(back))

    def live_entries(self) -> Iterator[Entries]:
        """Entries of all served samples, each once, in key order, about RANGE_SAMPLES at a time."""
        segments = list(self._live_segments())
        for low, high in _ranges(segments):
            parts, since = [], []
            for segment in segments:
                for part in self._between(segment, low, high):
                    parts.append(part)
                    since.append(segment.since[part.shard - segment.first])
            if parts:
                entries, since_N = concat(parts), np.concatenate(since)
                # of copies the one with the lowest since comes first, among equals the first added
                order = np.lexsort((since_N, entries.keys[:, 1], entries.keys[:, 0]))
                entries = entries.take(order)
                is_first = np.ones(len(entries), dtype=np.bool_)
                is_first[1:] = (entries.keys[1:] != entries.keys[:-1]).any(axis=1)
                yield entries.take(is_first)

    def _between(self, segment: _Segment, low: int, high: int) -> Iterator[Entries]:
        """Entries of served shards whose half keys are from ``low`` to below ``high``."""
        for number in segment.batches_between(low, high):
            batch = self._batch(segment, number, tuple(INDEX_SCHEMA.names))
            hi, shard = batch["key_hi"], batch["shard"]
            chosen = segment.alive[shard] & (hi >= np.uint64(low))
            if high < 2**64:
                chosen &= hi < np.uint64(high)
            if chosen.any():
                keys = np.stack([hi[chosen], batch["key_lo"][chosen]], axis=1)
                rest = (batch[name][chosen] for name in INDEX_SCHEMA.names[3:])
                yield Entries(keys, shard[chosen] + np.int32(segment.first), *rest)

    def _live_segments(self, after: int = 0) -> Iterator[_Segment]:
        self._settle()
        return (s for s in self._segments if s.last > after and s.num_alive)

    # -- files ------------------------------------------------------------------------------------
    def _batches_of(
        self, segment: _Segment, ascending: Keys, columns: tuple[str, ...]
    ) -> Iterator[tuple[Columns, slice]]:
        """Batches that may hold some of the keys, with the keys that they may hold."""
        wanted = segment.batches_of(ascending[:, 0])
        counts = Counter(segment.batches[number][0].name for number, _ in wanted)
        for number, span in wanted:
            file, _ = segment.batches[number]
            if 2 * counts[file.name] > len(file.first_keys):
                self._open_file(file, most=True)
            yield self._batch(segment, number, columns), span

    def _batch(self, segment: _Segment, number: int, columns: tuple[str, ...]) -> Columns:
        file, number = segment.batches[number]
        held = (file.name, number, columns)
        if held not in self._held:
            batch = self._open_file(file, most=False).batch(number, columns)
            found = {name: batch.column(name).to_numpy() for name in columns}
            if "shard" in found and not (
                0 <= found["shard"].min() <= found["shard"].max() < segment.num_shards
            ):
                raise ShardCorruptError(
                    f"index {file.name} names a shard that its record does not have; "
                    "run `distill repair`"
                )
            self._held[held] = found
            self._held_samples += len(batch)
            while self._held_samples > HELD_SAMPLES and len(self._held) > 1:
                _, dropped = self._held.popitem(last=False)
                self._held_samples -= len(dropped["key_hi"])
        self._held.move_to_end(held)
        return self._held[held]

    def _open_file(self, record: IndexRecord, *, most: bool) -> ArrowFile:
        if record.name not in self._files:
            file = self._open(record, most)
            if file.num_batches != len(record.first_keys):
                raise ShardCorruptError(
                    f"index {record.name} has {file.num_batches} batches, its record says "
                    f"{len(record.first_keys)}; run `distill repair`"
                )
            self._files[record.name] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(record.name)
        return self._files[record.name]


def _in_order(keys: Keys) -> tuple[npt.NDArray[np.int64], Keys]:
    """An order in which the first halves of keys ascend, and the keys in it."""
    order = np.argsort(keys[:, 0], kind="stable")
    return order, np.asfortranarray(keys[order])  # halves apart, as bisection reads them


def _ranges(segments: Sequence[_Segment]) -> list[tuple[int, int]]:
    """Half keys cut into ranges of about RANGE_SAMPLES samples, where batches start."""
    starts = [np.zeros(0, np.uint64)]
    sizes = [np.zeros(0)]
    for segment in segments:
        starts.append(segment.first_hi)
        per_file = {
            file.name: file.num_samples / len(file.first_keys) for file, _ in segment.batches
        }
        sizes.append(np.array([per_file[file.name] for file, _ in segment.batches]))
    hi, size = np.concatenate(starts), np.concatenate(sizes)
    order = np.argsort(hi, kind="stable")
    before = np.cumsum(size[order]) - size[order]
    number = (before // RANGE_SAMPLES).astype(np.int64)
    cuts = hi[order][np.flatnonzero(np.diff(number)) + 1].tolist()
    edges = sorted({0, *cuts, 2**64})
    return list(pairwise(edges))


def _matches(
    batch: Columns, asked: Keys
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Numbers of asked keys, each once, and the rows of the batch that have them.

    Bisects the longer list for every key of the shorter one.
    """
    stored = (batch["key_hi"], batch["key_lo"])
    wanted = (asked[:, 0], asked[:, 1])
    high = stored[0]
    if len(high) < len(asked) and (high[1:] != high[:-1]).all():
        for row, number in _pairs(stored, wanted):
            yield number, row
    else:
        yield from _pairs(wanted, stored)


Halves = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]


def _pairs(
    needles: Halves, haystack: Halves
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Rows of needles, each once, and the rows of an ascending haystack that equal them.

    Yields once, unless rows of the haystack share their high half.
    """
    needle = np.arange(len(needles[0]))
    row = np.searchsorted(haystack[0], needles[0], side="left")
    while len(needle):
        inside = row < len(haystack[0])
        needle, row = needle[inside], row[inside]
        like = haystack[0][row] == needles[0][needle]
        needle, row = needle[like], row[like]
        equal = haystack[1][row] == needles[1][needle]
        yield needle[equal], row[equal]
        row = row + 1
