"""The index answers like a dictionary of the first committed samples, however it is cut."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import ShardCorruptError
from storage.index import (
    INDEX_SCHEMA,
    Entries,
    concat,
    encode_index,
    format_keys,
    parse_keys,
)
from storage.ipc import ArrowFile
from storage.records import CommitRecord, FileRecord, IndexRecord, ShardRecord
from storage.sample_index import SampleIndex

HALVES = st.integers(0, 5) | st.sampled_from([2**63, 2**64 - 1])
"""Few values, so that keys, and their high halves, often are equal; also the largest ones."""
KEYS = st.tuples(HALVES, HALVES)


@dataclass
class Commit:
    """A commit to make: for every shard its keys and the record that first committed them."""

    shards: list[tuple[int, list[tuple[int, int]]]]
    removes: list[int] = field(default_factory=list)
    """Numbers of earlier shards."""


COMMITS = st.lists(
    st.builds(
        Commit,
        st.lists(
            st.tuples(st.integers(1, 4), st.lists(KEYS, min_size=1, max_size=8, unique=True)),
            max_size=3,
        ),
        st.lists(st.integers(0, 9), max_size=2),
    ),
    max_size=4,
)


@dataclass
class History:
    """Index files in memory, the records that name them, and what a dictionary would answer."""

    files: dict[str, bytes] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)
    shards_read: list[int] = field(default_factory=list)
    """Records whose shards were looked at."""

    def open_index(self, record: IndexRecord, most: bool) -> ArrowFile:
        self.opened.append(record.name)
        return ArrowFile(self.files[record.name], name=record.name, schema=INDEX_SCHEMA)

    def read_shards(self, record: CommitRecord) -> Sequence[ShardRecord]:
        self.shards_read.append(record.first)
        return record.shards

    def record(self, number: int, commit: Commit, first_shard: int) -> CommitRecord:
        shards, parts = [], []
        for place, (since, keys) in enumerate(commit.shards):
            shards.append(shard_record(first_shard + place, len(keys), since))
            parts.append(entries_of(keys, place))
        return CommitRecord(
            label_set="0",
            first=number,
            last=number,
            shards=tuple(shards),
            removed=tuple(name_of(n) for n in commit.removes if n < first_shard),
            index=self.index_of(parts),
            created_at="",
            provenance={},
        )

    def index_of(self, parts: list[Entries]) -> IndexRecord | None:
        if not parts:
            return None
        entries = concat(parts).sorted()
        data, first_keys = encode_index(entries)
        name = f"index-{len(self.files)}"
        self.files[name] = data
        return IndexRecord(
            name=name, file=FileRecord.of(data), num_samples=len(entries), first_keys=first_keys
        )


def name_of(number: int) -> str:
    return f"shard-{number}"


def shard_record(number: int, num_samples: int, since: int) -> ShardRecord:
    file = FileRecord.of(b"")
    return ShardRecord(
        name=name_of(number),
        partition="",
        labels=file,
        samples=file,
        batch_rows=(num_samples,),
        num_samples=num_samples,
        num_rows=num_samples,
        num_tokens=num_samples,
        since=since,
    )


def entries_of(keys: list[tuple[int, int]], shard: int) -> Entries:
    """Entries whose numbers tell shard and row: row r has its labels from 10 r on."""
    rows = np.arange(len(keys), dtype=np.int32)
    return Entries(
        keys=np.array(keys, dtype=np.uint64).reshape(-1, 2),
        shard=np.full(len(keys), shard, np.int32),
        row=rows,
        first_row=rows * np.int32(10),
        num_rows=rows + np.int32(1),
        num_tokens=rows + np.int32(2),
    )


def build(commits: list[Commit]) -> tuple[SampleIndex, dict[tuple[int, int], tuple[int, int]]]:
    """The index of some commits, and the shard and row of every sample by the obvious way."""
    history = History()
    index = SampleIndex(history.open_index, history.read_shards)
    shards: list[tuple[int, list[tuple[int, int]]] | None] = []
    for number, commit in enumerate(commits, start=1):
        index.add(history.record(number, commit, len(shards)))
        for removed in commit.removes:
            if removed < len(shards):
                shards[removed] = None
        shards += commit.shards
    model: dict[tuple[int, int], tuple[int, int]] = {}
    best: dict[tuple[int, int], int] = {}
    for shard, content in enumerate(shards):
        since, keys = content or (0, [])
        for row, key in enumerate(keys):
            if since < best.get(key, 1000):
                best[key], model[key] = since, (shard, row)
    return index, model


@contextmanager
def small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.index.INDEX_BATCH_ROWS", 3)
        patch.setattr("storage.sample_index.HELD_SAMPLES", 6)
        patch.setattr("storage.sample_index.RANGE_SAMPLES", 4)
        yield


def all_keys(commits: list[Commit]) -> Iterator[tuple[int, int]]:
    for commit in commits:
        for _, keys in commit.shards:
            yield from keys


@small_batches()
@given(COMMITS, st.lists(KEYS, max_size=12))
def test_a_lookup_finds_what_a_dictionary_finds(
    commits: list[Commit], others: list[tuple[int, int]]
) -> None:
    """Of copies the one with the lowest ``since`` is served, among equals the first."""
    index, model = build(commits)
    asked = [*all_keys(commits), *others]
    keys = np.array(asked, dtype=np.uint64).reshape(-1, 2)
    expected = [key in model for key in asked]
    assert index.contains(keys).tolist() == expected
    located = index.locate(keys)
    assert located.found.tolist() == expected
    for number, key in enumerate(asked):
        if key in model:
            found = located.entries.take(np.array([number]))
            shard, row = model[key]
            assert (found.shard[0], found.row[0]) == (shard, row)
            assert (found.first_row[0], found.num_rows[0]) == (10 * row, row + 1)
            assert found.num_tokens[0] == row + 2


@small_batches()
@settings(max_examples=20)
@given(COMMITS)
def test_live_entries_are_each_served_sample_once(commits: list[Commit]) -> None:
    index, model = build(commits)
    found = [
        (tuple(key), (shard, row))
        for entries in index.live_entries()
        for key, shard, row in zip(
            entries.keys.tolist(), entries.shard.tolist(), entries.row.tolist(), strict=True
        )
    ]
    assert len(found) == len(model)
    assert dict(found) == model


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))))
def test_keys_are_hex_and_halves(keys: list[tuple[int, int]]) -> None:
    text = [f"{high:016x}{low:016x}" for high, low in keys]
    parsed = parse_keys(text)
    assert parsed.tolist() == [list(key) for key in keys]
    assert format_keys(parsed) == text


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6, 7])
def test_a_key_on_a_batch_border_is_found(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 3: all keys share their high half, so it begins and ends every batch."""
    monkeypatch.setattr("storage.index.INDEX_BATCH_ROWS", 3)
    keys = [(7, low) for low in range(length)]
    index, _ = build([Commit([(1, keys)])])
    assert index.contains(np.array(keys, dtype=np.uint64)).all()
    assert not index.contains(np.array([(7, length), (6, 0), (8, 0)], dtype=np.uint64)).any()


def test_planning_reads_no_more_than_the_batches_that_may_hold_the_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("storage.index.INDEX_BATCH_ROWS", 2)
    history = History()
    index = SampleIndex(history.open_index, history.read_shards)
    index.add(history.record(1, Commit([(1, [(high, 0) for high in range(10)])]), 0))
    read = []
    batch = ArrowFile.batch
    monkeypatch.setattr(
        ArrowFile, "batch", lambda self, n, columns: read.append(n) or batch(self, n, columns)
    )
    assert index.contains(np.array([(5, 0)], dtype=np.uint64)).all()
    assert read == [2]
    assert index.contains(np.array([(5, 0), (5, 0)], dtype=np.uint64)).all()
    assert read == [2]  # held
    index.contains(np.array([(high, 0) for high in range(10)], dtype=np.uint64))
    assert read == [2, 0, 1, 3, 4]
    assert len(history.opened) == 1


def test_no_key_reads_nothing() -> None:
    history = History()
    index = SampleIndex(history.open_index, history.read_shards)
    index.add(history.record(1, Commit([(1, [(1, 1)])]), 0))
    assert index.contains(parse_keys([])).tolist() == []
    assert len(index.locate(parse_keys([])).entries) == 0
    assert history.opened == []


def test_an_index_with_another_number_of_batches_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history = History()
    record = history.record(1, Commit([(1, [(1, 1), (2, 2)])]), 0)
    assert record.index is not None
    monkeypatch.setattr("storage.index.INDEX_BATCH_ROWS", 1)
    two, _ = encode_index(entries_of([(1, 1), (2, 2)], 0))
    history.files[record.index.name] = two
    index = SampleIndex(history.open_index, history.read_shards)
    index.add(record)
    with pytest.raises(ShardCorruptError, match="has 2 batches, its record says 1"):
        index.contains(np.array([(1, 1)], dtype=np.uint64))


def test_planning_looks_at_shards_only_where_one_was_removed() -> None:
    history = History()
    index = SampleIndex(history.open_index, history.read_shards)
    index.add(history.record(1, Commit([(1, [(1, 1)]), (1, [(2, 2)])]), 0))
    index.add(history.record(2, Commit([(2, [(3, 3)])]), 2))
    keys = np.array([(1, 1), (2, 2), (3, 3)], dtype=np.uint64)
    assert index.contains(keys).tolist() == [True, True, True]
    assert history.shards_read == []
    index.add(history.record(3, Commit([], removes=[1]), 3))
    assert index.contains(keys).tolist() == [True, False, True]
    assert history.shards_read == [1, 2]


def test_removing_what_is_unknown_changes_nothing() -> None:
    index, model = build([Commit([(1, [(1, 1)])]), Commit([], removes=[7])])
    assert index.contains(np.array(list(model), dtype=np.uint64)).all()
    assert [shard.name for shard in index.live_shards] == ["shard-0"]
