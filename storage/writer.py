"""Committing: samples in, shards and one record out.

Files come first, under names nobody else uses; the record that names them comes last and makes
all of them visible in one step. A writer that dies leaves files that nobody looks at.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np

from storage.durable import new_name, write_file, write_index
from storage.index import Entries, concat, parse_keys
from storage.label_set import LabelSet
from storage.merge import merge_due
from storage.partitions import common_partition, leading_bits, shard_bits
from storage.provenance import utc_now
from storage.records import CommitRecord, Name, ShardRecord, sealed, to_json
from storage.samples import LabelledSample
from storage.shard import encode_shard

SHARD_ROWS = 2**18
"""Most label rows of a shard, unless a single sample has more; about 45 MB at k = 64."""


@dataclass(frozen=True, slots=True)
class NewShard:
    """A shard whose files are durable and which no record names yet."""

    record: ShardRecord
    entries: Entries
    """Index entries of its samples; ``shard`` is 0."""

    def since(self, number: int) -> "NewShard":
        """The same shard, first committed by record ``number``."""
        return replace(self, record=self.record.model_copy(update={"since": number}))


class Part(ABC):
    """Samples that become one shard; kept until a record names it.

    Args:
        keys: Their sample keys.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = list(keys)
        self._written: NewShard | None = None

    @abstractmethod
    def write(self, label_set: LabelSet) -> NewShard:
        """Write the files of the shard."""

    @abstractmethod
    def without(self, stored: set[str]) -> "Part | None":
        """The same samples except some; None if none is left."""

    def written(self, label_set: LabelSet) -> NewShard:
        """The shard, written once, or anew if ``gc`` announced to delete its files."""
        if self._written is None or self._written.record.name in label_set.deleted:
            self._written = self.write(label_set)
        return self._written


class SamplesPart(Part):
    """Samples in memory.

    Args:
        samples: Checked, in key order.
    """

    def __init__(self, samples: Sequence[LabelledSample]) -> None:
        super().__init__([sample.key for sample in samples])
        self._samples = samples

    def write(self, label_set: LabelSet) -> NewShard:
        """Encode and write them."""
        return write_shard(label_set, self._samples)

    def without(self, stored: set[str]) -> Part | None:
        """A new part of the others."""
        left = [sample for sample in self._samples if sample.key not in stored]
        return SamplesPart(left) if left else None


def append(
    label_set: LabelSet, samples: Sequence[LabelledSample], provenance: dict[str, str]
) -> CommitRecord | None:
    """Commit new samples in one step: all of them become visible or none.

    Samples that another writer committed first are left out, so a sample is stored once. Any
    number of processes and hosts may append at the same time.

    Returns:
        The commit record, or None when every sample was already stored.

    Raises:
        BadLabelError: if a sample breaks an invariant; nothing is written.
        LabelStoreError: if the store cannot be written; earlier commits are intact.
    """
    for sample in samples:
        sample.check(label_set.spec)
    unique = {sample.key: sample for sample in reversed(samples)}
    new = [unique[key] for key in label_set.missing(list(unique))]
    num_tokens = sum(len(sample.response_ids_R) for sample in new)
    bits = shard_bits(num_tokens, label_set.partition_bits)
    return commit(label_set, [SamplesPart(group) for group in split(new, bits)], provenance)


def commit(
    label_set: LabelSet, parts: Sequence[Part], provenance: dict[str, str]
) -> CommitRecord | None:
    """Make the samples of all parts visible in one step, those left out that are stored already.

    Returns:
        The commit record, or None when every sample was already stored.

    Raises:
        LabelStoreError: if the store cannot be written; earlier commits are intact.
    """
    while True:
        keys = [key for part in parts for key in part.keys]
        stored = set(keys).difference(label_set.missing(keys))
        remaining = [
            part.without(stored) if stored.intersection(part.keys) else part for part in parts
        ]
        parts = [part for part in remaining if part is not None]
        if not parts:
            return None
        number = label_set.log.last + 1
        shards = [part.written(label_set).since(number) for part in parts]
        record = publish(label_set, shards, provenance=provenance)
        if record is not None:
            return record
        # another writer was faster: it may have committed some of ours, so look again


def split(samples: Sequence[LabelledSample], bits: int) -> Iterator[list[LabelledSample]]:
    """Groups of samples for one shard each, in key order, cut by their leading ``bits``."""
    keys = parse_keys([sample.key for sample in samples])
    numbers = leading_bits(keys, bits)
    group: list[LabelledSample] = []
    num_rows, last = 0, -1
    for index in np.lexsort((keys[:, 1], keys[:, 0])).tolist():
        sample, number = samples[index], int(numbers[index])
        full = num_rows + len(sample.positions_N) > SHARD_ROWS
        if group and (number != last or full):
            yield group
            group, num_rows = [], 0
        group.append(sample)
        num_rows, last = num_rows + len(sample.positions_N), number
    if group:
        yield group


def write_shard(
    label_set: LabelSet, samples: Sequence[LabelledSample], *, bits: int | None = None
) -> NewShard:
    """Write the files of a shard.

    Args:
        label_set: Where it will belong.
        samples: Checked, in key order.
        bits: log2 of the number of partitions, if it is about to change.

    Raises:
        LabelStoreError: if the store cannot be written.
    """
    encoded = encode_shard(samples, label_set.spec)
    keys = parse_keys([sample.key for sample in samples])
    name = new_name(encoded.labels)
    record = ShardRecord(
        name=name,
        partition=common_partition(keys, label_set.partition_bits if bits is None else bits),
        labels=write_file(label_set, label_set.shard_path(name, "labels"), encoded.labels),
        samples=write_file(label_set, label_set.shard_path(name, "samples"), encoded.samples),
        batch_rows=encoded.batch_rows,
        num_samples=encoded.num_samples,
        num_rows=encoded.num_rows,
        num_tokens=encoded.num_tokens,
        since=label_set.log.last + 1,
    )
    counts = np.arange(len(samples), dtype=np.int32)
    rows = np.array([len(sample.positions_N) for sample in samples], dtype=np.int32)
    tokens = np.array([len(sample.response_ids_R) for sample in samples], dtype=np.int32)
    shard = np.zeros_like(counts)
    return NewShard(record, Entries(keys, shard, counts, encoded.first_rows, rows, tokens))


def copy_shard(source: LabelSet, shard: NewShard, target: LabelSet) -> NewShard:
    """Copy a shard, byte for byte, to another store under a name of its own.

    Raises:
        ShardCorruptError: if its bytes are not those of its record.
        LabelStoreError: if the target cannot be written.
    """
    old = shard.record
    name = new_name(old.labels.xxh3_128.encode())
    for table in ("labels", "samples"):
        path = source.shard_path(old.name, table)
        data = source.objects.get(path)
        old.file(table).require(data, name=f"{source.objects.uri}/{path}")
        write_file(target, target.shard_path(name, table), data)
    partition = common_partition(shard.entries.keys, target.partition_bits)
    return replace(shard, record=old.model_copy(update={"name": name, "partition": partition}))


def publish(
    label_set: LabelSet,
    shards: Sequence[NewShard],
    *,
    removed: Iterable[Name] = (),
    dropped: bool = False,
    partition_bits: int | None = None,
    provenance: dict[str, str],
) -> CommitRecord | None:
    """Create the next commit record.

    Returns:
        The record, or None if another writer took its number; the shards' files stay usable.

    Raises:
        LabelStoreError: if the store cannot be written.
    """
    entries = number_shards([new.entries for new in shards])
    record = CommitRecord(
        label_set=label_set.key,
        first=label_set.log.last + 1,
        last=label_set.log.last + 1,
        removed=tuple(removed),
        shards=tuple(new.record for new in shards),
        index=None if entries is None else write_index(label_set, entries),
        dropped=dropped,
        partition_bits=partition_bits,
        created_at=utc_now(),
        provenance=provenance,
    )
    was_dropped = label_set.dropped
    if not label_set.log.create(record):
        return None
    if was_dropped and shards:
        label_set.objects.create(f"{label_set.prefix}/spec.json", to_json(label_set.document))
    label_set.refresh()
    merge_due(label_set, record.last)
    return sealed(record)


def number_shards(parts: Sequence[Entries]) -> Entries | None:
    """Entries of several shards in key order, ``shard`` numbering the parts; None if empty."""
    if not parts:
        return None
    numbered = [
        replace(part, shard=np.full(len(part), number, dtype=np.int32))
        for number, part in enumerate(parts)
    ]
    return concat(numbered).sorted()


class LabelWriter:
    """A bounded buffer of finished samples that commits whenever it is full.

    ``add`` returns only when there is room again, so a slow store holds back whoever labels. As a
    context manager it commits the rest on a clean exit; after an exception, what was committed
    stays and the rest is asked for again by the next run.

    Args:
        label_set: Where the samples go.
        provenance: Recorded with every commit.
        commit_samples: Samples of a commit; fewer if they have SHARD_ROWS label rows together.
    """

    def __init__(
        self, label_set: LabelSet, provenance: dict[str, str], *, commit_samples: int
    ) -> None:
        self._label_set, self._provenance = label_set, provenance
        self._commit_samples = commit_samples
        self._buffer: list[LabelledSample] = []
        self._rows = 0
        self.committed = 0
        """Samples that are durable, by this writer or a faster one."""

    def add(self, sample: LabelledSample) -> None:
        """Take a sample; commits when the buffer is full.

        Raises:
            BadLabelError: if the sample breaks an invariant of the format; it is not taken.
            LabelStoreError: if the store cannot be written; earlier commits are intact.
        """
        sample.check(self._label_set.spec)
        self._buffer.append(sample)
        self._rows += len(sample.positions_N)
        if len(self._buffer) >= self._commit_samples or self._rows >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Commit what is in the buffer."""
        if self._buffer:
            append(self._label_set, self._buffer, self._provenance)
            self.committed += len(self._buffer)
            self._buffer, self._rows = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.flush()
