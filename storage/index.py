"""Which samples a label set holds, and where: planning never opens a shard.

Every commit record has an index file of its samples, sorted by key; merged records have one index
for all of theirs. A lookup goes through the few files that cover the history and searches each by
bisection, batch by batch, so its cost per key hardly depends on the size of the set.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.errors import BadKeyError, ShardCorruptError
from storage.ipc import ArrowFile, encode_file
from storage.partitions import Keys
from storage.records import CommitRecord, IndexRecord, ShardRecord
from storage.schema import FORMAT_VERSION

INDEX_BATCH_ROWS = 2**13
"""Samples of a record batch of an index: what a lookup of a single key reads."""

SAMPLE_KEY = re.compile(r"[0-9a-f]{32}")

HELD_BATCHES = 256
"""Index batches that stay in memory (about 300 kB each)."""

OPEN_FILES = 4
"""Index files that stay open."""

Int32s = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

KEY_COLUMNS = ("key_hi", "key_lo", "shard")
INDEX_SCHEMA = pa.schema(
    [
        pa.field("key_hi", pa.uint64(), nullable=False),
        pa.field("key_lo", pa.uint64(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("first_row", pa.int32(), nullable=False),
        pa.field("num_rows", pa.int32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
    ],
    metadata={"distillcache.format": str(FORMAT_VERSION), "distillcache.table": "index"},
)


@dataclass(frozen=True, slots=True)
class Entries:
    """Index entries of N samples."""

    keys: Keys
    """uint64[N, 2]."""
    shard: Int32s
    """int32[N]: place of the sample's shard in a list of shards."""
    row: Int32s
    """int32[N]: row of the sample in its samples file."""
    first_row: Int32s
    """int32[N]: its first row in the labels file."""
    num_rows: Int32s
    """int32[N]: its labelled positions."""
    num_tokens: Int32s
    """int32[N]: its response tokens."""

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: npt.NDArray[np.integer] | Bools) -> "Entries":
        """Some of the entries, by number or mask."""
        return Entries(*(getattr(self, name)[rows] for name in self.__slots__))

    def sorted(self) -> "Entries":
        """In ascending order of the keys."""
        return self.take(np.lexsort((self.keys[:, 1], self.keys[:, 0])))


def concat(parts: Sequence[Entries]) -> Entries:
    """All entries of all parts, in order."""
    names = Entries.__slots__
    return Entries(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def parse_keys(keys: Sequence[str]) -> Keys:
    """Sample keys from hex, uint64[N, 2].

    Raises:
        BadKeyError: if one is not 32 hex digits.
    """
    try:
        data = bytes.fromhex("".join(keys))
    except (ValueError, TypeError):
        data = b""
    if len(data) != 16 * len(keys) or (keys and set(map(len, keys)) != {32}):
        bad = next(key for key in keys if not SAMPLE_KEY.fullmatch(str(key)))
        raise BadKeyError(f"{bad!r} is no sample key: a key is 32 lower-case hex digits")
    return np.frombuffer(data, dtype=">u8").reshape(-1, 2).astype(np.uint64)


def format_keys(keys: Keys) -> list[str]:
    """Sample keys as hex."""
    text = keys.astype(">u8").tobytes().hex()
    return [text[start : start + 32] for start in range(0, len(text), 32)]


def encode_index(entries: Entries) -> tuple[bytes, tuple[str, ...]]:
    """The bytes of an index file, and the first key of each of its batches.

    Args:
        entries: Sorted by key; at least one.
    """
    columns = [entries.keys[:, 0], entries.keys[:, 1]]
    columns += [getattr(entries, name) for name in INDEX_SCHEMA.names[2:]]
    arrays = [pa.array(np.ascontiguousarray(column)) for column in columns]
    starts = range(0, len(entries), INDEX_BATCH_ROWS)
    whole = pa.RecordBatch.from_arrays(arrays, schema=INDEX_SCHEMA)
    batches = [whole.slice(start, INDEX_BATCH_ROWS) for start in starts]
    return encode_file(batches, INDEX_SCHEMA), tuple(format_keys(entries.keys[list(starts)]))


class _Segment:
    """The index of the records up to ``last``, whose shards are numbered from ``first_shard``."""

    def __init__(self, record: IndexRecord, last: int, first_shard: int, num_shards: int) -> None:
        self.last = last
        self.record, self.first_shard, self.num_shards = record, first_shard, num_shards
        self.first_hi = parse_keys(record.first_keys)[:, 0]

    def batches_of(self, hi: npt.NDArray[np.uint64]) -> Iterator[tuple[int, slice]]:
        """Numbers of the batches that may hold some of the ascending ``hi``, with those."""
        starts = np.searchsorted(hi, self.first_hi, side="left")
        # a batch may end with the half key with which the next one begins
        ends = np.append(np.searchsorted(hi, self.first_hi[1:], side="right"), len(hi))
        for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            if start < end:
                yield number, slice(start, end)


@dataclass(frozen=True, slots=True)
class Located:
    """Where N keys lie."""

    found: Bools
    """bool[N]: whether the set holds the key; the entries of the others are meaningless."""
    entries: Entries
    """In the order of the keys; ``shard`` counts in the index's list of shards."""


class SampleIndex:
    """The index files that cover a history.

    Args:
        open_index: Opens an index file; told whether most of it will be read.
    """

    def __init__(self, open_index: Callable[[IndexRecord, bool], ArrowFile]) -> None:
        self._open = open_index
        self._files: OrderedDict[str, ArrowFile] = OrderedDict()
        self._segments: list[_Segment] = []
        self._held: OrderedDict[tuple[str, int, bool], Entries] = OrderedDict()
        self._number_of: dict[str, int] = {}
        self.shards: list[ShardRecord] = []
        """Every shard that was ever added, in order."""
        self.alive: list[bool] = []
        """Whether each of them is served."""

    def add(self, record: CommitRecord) -> None:
        """Take up the next record of the history."""
        for name in record.removed:
            number = self._number_of.pop(name, None)
            if number is not None:
                self.alive[number] = False
        if record.index is not None:
            self._segments.append(
                _Segment(record.index, record.last, len(self.shards), len(record.shards))
            )
        for shard in record.shards:
            self._number_of[shard.name] = len(self.shards)
            self.shards.append(shard)
            self.alive.append(True)

    @property
    def live_shards(self) -> list[ShardRecord]:
        """Shards that are served, in the order of their commits."""
        return [shard for shard, alive in zip(self.shards, self.alive, strict=True) if alive]

    def contains(self, keys: Keys, *, after: int = 0) -> Bools:
        """bool[N]: which of the keys the set holds, as far as records behind ``after`` know."""
        return self._search(keys, whole=False, after=after).found

    def locate(self, keys: Keys) -> Located:
        """Where the keys lie."""
        return self._search(keys, whole=True)

    def _search(self, keys: Keys, *, whole: bool, after: int = 0) -> Located:
        order = np.argsort(keys[:, 0], kind="stable")
        ascending = np.asfortranarray(keys[order])  # halves apart, as bisection reads them
        alive = np.array([*self.alive, False])
        since = np.array([*(shard.since for shard in self.shards), 0])
        best = np.full(len(keys), np.iinfo(np.int64).max)
        entries = _absent(ascending)
        for segment in self._live_segments(after):
            spans = list(segment.batches_of(ascending[:, 0]))
            if 2 * len(spans) > len(segment.record.first_keys):
                self._open_file(segment, most=True)
            for number, span in spans:
                batch = self._batch(segment, number, whole=whole)
                for matching, rows in _matches(batch, ascending[span]):
                    shard, asked = batch.shard[rows], matching + span.start
                    better = alive[shard] & (since[shard] < best[asked])
                    asked, rows = asked[better], rows[better]
                    best[asked] = since[shard[better]]
                    for name in Entries.__slots__[1:]:
                        getattr(entries, name)[asked] = getattr(batch, name)[rows]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return Located(entries.shard[back] >= 0, entries.take(back))

    def live_entries(self) -> Iterator[Entries]:
        """Entries of all served samples, each once, some thousands at a time."""
        for segment in self._live_segments():
            self._open_file(segment, most=True)
            for number in range(len(segment.record.first_keys)):
                batch = self._batch(segment, number, whole=True)
                served = self.locate(batch.keys).entries
                same = (served.shard == batch.shard) & (served.row == batch.row)
                if same.any():
                    yield batch.take(same)

    def _live_segments(self, after: int = 0) -> Iterator[_Segment]:
        for segment in self._segments:
            start = segment.first_shard
            if segment.last > after and any(self.alive[start : start + segment.num_shards]):
                yield segment

    def _batch(self, segment: _Segment, number: int, *, whole: bool) -> Entries:
        held = (segment.record.name, number, whole)
        if held not in self._held:
            self._held[held] = self._read(segment, number, whole=whole)
            if len(self._held) > HELD_BATCHES:
                self._held.popitem(last=False)
        self._held.move_to_end(held)
        return self._held[held]

    def _open_file(self, segment: _Segment, *, most: bool) -> ArrowFile:
        record = segment.record
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

    def _read(self, segment: _Segment, number: int, *, whole: bool) -> Entries:
        columns = INDEX_SCHEMA.names if whole else KEY_COLUMNS
        batch = self._open_file(segment, most=False).batch(number, columns)
        found = {name: batch.column(name).to_numpy() for name in columns}
        keys = np.stack([found.pop("key_hi"), found.pop("key_lo")]).T
        shard = found.pop("shard")
        if not 0 <= shard.min() <= shard.max() < segment.num_shards:
            raise ShardCorruptError(
                f"index {segment.record.name} names a shard that its record does not have; "
                "run `distill repair`"
            )
        shard = shard + np.int32(segment.first_shard)
        nothing = np.zeros(len(keys), dtype=np.int32)
        rest = (found.get(name, nothing) for name in INDEX_SCHEMA.names[3:])
        return Entries(keys, shard, *rest)


def _absent(keys: Keys) -> Entries:
    return Entries(keys, *(np.full(len(keys), -1, dtype=np.int32) for _ in range(5)))


def _matches(
    batch: Entries, asked: Keys
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Numbers of asked keys, each once, and the rows of the batch that have them.

    Bisects the longer list for every key of the shorter one.
    """
    high = batch.keys[:, 0]
    if len(high) < len(asked) and (high[1:] != high[:-1]).all():
        for row, number in _pairs(batch.keys, asked):
            yield number, row
    else:
        yield from _pairs(asked, batch.keys)


def _pairs(
    needles: Keys, haystack: Keys
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Rows of needles, each once, and the rows of an ascending haystack that equal them.

    Yields once, unless rows of the haystack share their high half.
    """
    needle = np.arange(len(needles))
    row = np.searchsorted(haystack[:, 0], needles[:, 0], side="left")
    while len(needle):
        inside = row < len(haystack)
        needle, row = needle[inside], row[inside]
        like = haystack[row, 0] == needles[needle, 0]
        needle, row = needle[like], row[like]
        equal = haystack[row, 1] == needles[needle, 1]
        yield needle[equal], row[equal]
        row = row + 1
