"""Read every byte of a label set and say what is damaged and what is lost with it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import pyarrow as pa

from storage.certificate import damaged_certificates
from storage.errors import BadLabelError, EditedSpecError, FormatError, ShardCorruptError
from storage.index import INDEX_SCHEMA, Entries, concat, format_keys, parse_keys
from storage.ipc import ArrowFile
from storage.label_set import LabelSet
from storage.quarantine import Quarantine
from storage.records import CommitRecord, FileRecord, IndexRecord, Name, ShardRecord
from storage.shard import ShardReader
from storage.sidecar import read_spec, spec_path

DAMAGE = (ShardCorruptError, FormatError, BadLabelError)
"""What proves damage. That a file cannot be read now proves nothing, and is raised."""


_Readable = tuple[CommitRecord, Sequence[ShardRecord]]
"""A record with the shards that it adds."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding."""

    what: Literal["record", "merged", "index", "shard", "sidecar", "certificate", "quarantine"]
    path: str
    """Of the damaged file, below the store's URI."""
    error: str
    lost_samples: int
    """Samples that cannot be served because of it; 0 where everything can be recovered."""
    name: str = ""
    """Of the damaged shard, of a shard whose index is damaged, or the key of a sidecar."""
    number: int = 0
    """Of the damaged record or sidecar part; 0 for a sidecar's spec."""


def verify(
    label_set: LabelSet, *, advance: Callable[[int], object] = lambda num_bytes: None
) -> Iterator[Problem]:
    """Check the history, every index and shard that is served, and all that lies beside them.

    That is every sidecar, certificate and sample in quarantine.

    Args:
        label_set: The set; its spec has been checked on opening.
        advance: Called with the bytes of every shard that was read, for progress bars.

    Raises:
        StoreAccessError: if the store cannot be read.
    """
    histories = _History(label_set)
    yield from histories.problems()
    added: dict[Name, tuple[ShardRecord, CommitRecord]] = {}
    for record, shards in histories.readable:
        for name in record.removed:
            added.pop(name, None)
        added.update((shard.name, (shard, record)) for shard in shards)
    entries: dict[Name, Entries] = {}
    for shard, _ in added.values():
        try:
            entries[shard.name] = check_shard(label_set, shard)
        except DAMAGE as error:
            path = label_set.shard_path(shard.name, "labels")
            yield Problem("shard", path, str(error), shard.num_samples, name=shard.name)
        advance(shard.num_bytes)
    for record, shards in histories.readable:
        numbers = {
            shard.name: number
            for number, shard in enumerate(shards)
            if shard.name in entries and added[shard.name][1] is record
        }
        yield from _check_index(label_set, record, numbers, entries)
    yield from _check_sidecars(label_set)
    for path, text in damaged_certificates(label_set):
        yield Problem("certificate", path, text, 0)
    for path, text in Quarantine(label_set).damaged():
        yield Problem("quarantine", path, text, 0)


def _check_sidecars(label_set: LabelSet) -> Iterator[Problem]:
    for key in label_set.objects.directories(f"{label_set.prefix}/sidecars"):
        try:
            sidecar = label_set.sidecar(read_spec(label_set, key))
        except EditedSpecError as error:
            yield Problem("sidecar", spec_path(label_set, key), str(error), 0, name=key)
            continue
        for number, path, text in sidecar.damaged():
            yield Problem("sidecar", path, text, 0, name=key, number=number)


class _History:
    """The records that can be read: the fewest that cover the history, damaged ones left out."""

    def __init__(self, label_set: LabelSet) -> None:
        self._set = label_set
        self.readable: list[_Readable] = []
        self._problems: list[Problem] = []
        merged: dict[int, list[CommitRecord]] = {}
        for path in label_set.log.merged_paths():
            try:
                record = label_set.log.merged(*label_set.log.range_of(path))
            except DAMAGE as error:
                self._problems.append(Problem("merged", path, str(error), 0))
            else:
                merged.setdefault(record.first, []).append(record)
        end = label_set.log.end()
        number = 1
        while number <= end:
            found = self._longest(merged.get(number, [])) or self._single(number)
            if found is not None:
                self.readable.append(found)
            following = found[0].last + 1 if found is not None else number + 1
            for covered in range(number, following):
                if number in merged:  # not needed now, but somebody may be in the middle of them
                    self._single(covered)
            number = following

    def _longest(self, records: list[CommitRecord]) -> _Readable | None:
        """Of merged records with the same start the longest one with its shards."""
        for record in sorted(records, key=lambda record: -record.last):
            try:
                return record, list(self._set.log.shards(record))
            except (*DAMAGE, FileNotFoundError) as error:
                path = self._set.log.path(record.first, record.last)
                self._problems.append(Problem("merged", path, str(error), 0))
        return None

    def _single(self, number: int) -> _Readable | None:
        try:
            record = self._set.log.effective(number)
        except DAMAGE as error:
            text = str(error)
        else:
            if record is not None:
                return record, record.shards
            text = f"record {number} is missing although later ones exist"
        path = self._set.log.path(number)
        self._problems.append(Problem("record", path, text, 0, number=number))
        return None

    def problems(self) -> Iterator[Problem]:
        """Damaged records."""
        yield from self._problems


def check_shard(label_set: LabelSet, shard: ShardRecord) -> Entries:
    """Check both files of a shard: checksums, schema, counts and every label.

    Returns:
        What an index has to say of its samples.

    Raises:
        ShardCorruptError, FormatError, BadLabelError: naming file, batch and what is wrong.
    """
    labels, samples = (
        open_whole(
            label_set,
            label_set.shard_path(shard.name, table),
            shard.file(table),
            label_set.table_schema(table),
        )
        for table in ("labels", "samples")
    )
    name = label_set.shard_path(shard.name, "labels")
    reader = ShardReader(labels, samples, label_set.spec, shard.batch_rows, name=name)
    found: list[tuple[str, str, int, int]] = []
    for number in range(labels.num_batches):
        for row, sample in reader.batch(number):
            sample.check(label_set.spec, stored=True)
            _require(row == len(found), f"{name}: sample {row} of its samples file is missing")
            lengths = (len(sample.positions_N), len(sample.response_ids_R))
            found.append((sample.key, sample.prompt_key, *lengths))
    table = samples.table(["sample_key", "prompt_key", "first_row", "num_rows", "num_tokens"])
    keys, prompt_keys, num_rows, num_tokens = (list(c) for c in zip(*found, strict=True))
    first_row = [end - rows for end, rows in zip(accumulate(num_rows), num_rows, strict=True)]
    expected = [keys, prompt_keys, first_row, num_rows, num_tokens]
    for column, values in zip(table.column_names, expected, strict=True):
        stated = table[column].to_pylist()
        _require(stated == values, f"{name}: {column} of its samples file does not fit its labels")
    counts = (len(keys), sum(num_rows), sum(num_tokens))
    recorded = (shard.num_samples, shard.num_rows, shard.num_tokens)
    _require(
        counts == recorded,
        f"{name} and its samples file do not hold the {shard.num_samples} samples, "
        f"{shard.num_rows} rows and {shard.num_tokens} tokens of their record",
    )
    zeros = np.zeros(len(keys), dtype=np.int32)
    numbers = (np.arange(len(keys)), first_row, num_rows, num_tokens)
    return Entries(parse_keys(keys), zeros, *(np.array(n, dtype=np.int32) for n in numbers))


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ShardCorruptError(problem)


def open_whole(label_set: LabelSet, path: str, file: FileRecord, schema: pa.Schema) -> ArrowFile:
    """A file of the set whose every byte has been checked.

    Raises:
        ShardCorruptError: if it is missing or differs from its record.
    """
    name = f"{label_set.objects.uri}/{path}"
    try:
        data = label_set.objects.get(path)
    except FileNotFoundError as error:
        raise ShardCorruptError(f"{name} was committed and is missing") from error
    file.require(data, name=name)
    return ArrowFile(data, name=name, schema=schema)


def _check_index(
    label_set: LabelSet,
    record: CommitRecord,
    numbers: Mapping[Name, int],
    entries: Mapping[Name, Entries],
) -> Iterator[Problem]:
    """The indexes of a record must say of its good shards what the shards themselves say.

    Args:
        label_set: The set.
        record: A record.
        numbers: Good shards that it added, by their numbers in its indexes.
        entries: What good shards say of their samples.
    """
    if not numbers:
        return
    paths = ", ".join(label_set.index_path(index.name) for index in record.indexes)
    try:
        found = concat([_read_index(label_set, index) for index in record.indexes])
    except DAMAGE as error:
        for name in numbers:
            yield Problem("index", paths, str(error), 0, name=name)
        return
    in_order = np.array_equal(found.keys, found.sorted().keys)
    known = bool(((found.shard >= 0) & (found.shard < record.num_shards)).all())
    by_shard = found.take(np.argsort(found.shard, kind="stable"))
    for name, number in numbers.items():
        start, stop = np.searchsorted(by_shard.shard, [number, number + 1]).tolist()
        mine = by_shard.take(np.arange(start, stop))
        if not in_order or not known or not _agree(mine, entries[name], found):
            error_text = f"{label_set.objects.uri}/{paths} does not fit shard {name}"
            yield Problem("index", paths, error_text, 0, name=name)


def _read_index(label_set: LabelSet, index: IndexRecord) -> Entries:
    """All entries of an index file.

    Raises:
        ShardCorruptError: if it is not what its record says.
    """
    path = label_set.index_path(index.name)
    table = open_whole(label_set, path, index.file, INDEX_SCHEMA).table()
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    keys = np.stack([columns.pop("key_hi"), columns.pop("key_lo")], axis=1)
    starts = np.cumsum([0, *(batch.num_rows for batch in table.to_batches())])[:-1]
    _require(
        len(keys) == index.num_samples and format_keys(keys[starts]) == list(index.first_keys),
        f"{label_set.objects.uri}/{path} does not have the keys of its record",
    )
    return Entries(keys, **columns)


def _agree(mine: Entries, expected: Entries, everything: Entries) -> bool:
    """Whether an index finds every sample of a shard: there, or an older copy of it elsewhere."""
    if len(mine) and mine.row.max() >= len(expected):
        return False
    columns = ("keys", "row", "first_row", "num_rows", "num_tokens")
    there = expected.take(mine.row)
    if not all(np.array_equal(getattr(mine, c), getattr(there, c)) for c in columns):
        return False
    elsewhere = np.ones(len(expected), dtype=np.bool_)
    elsewhere[mine.row] = False
    if not elsewhere.any():
        return True
    copies = {tuple(key) for key in everything.keys.tolist()}
    return all(tuple(key) in copies for key in expected.keys[elsewhere].tolist())
