"""Merged records: the sum of many commit records, with few large indexes for all their samples."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from storage.durable import write_index, write_shard_table
from storage.errors import LabelStoreError
from storage.label_set import LabelSet
from storage.log import is_dropped, merge_ranges
from storage.provenance import utc_now
from storage.records import CommitRecord, MergedShards, Name
from storage.sample_index import SampleIndex
from storage.shard_table import names_of


def merge_due(label_set: LabelSet, last: int) -> None:
    """Make the merged records that are due once record ``last`` exists.

    They only make reading quicker: a failure here must not fail the commit before it.
    """
    with contextlib.suppress(LabelStoreError, FileNotFoundError):
        for first, end in merge_ranges(last):
            merge(label_set, first, end)


def merge(label_set: LabelSet, first: int, last: int) -> None:
    """Sum up the records ``first`` to ``last`` in one, a range of keys after the other.

    Raises:
        LabelStoreError: if a record or an index cannot be read, or the result not be written.
    """
    records = list(label_set.log.walk(first, last))
    bits = [r.partition_bits for r in records if r.partition_bits is not None]
    merged = CommitRecord(
        label_set=label_set.key,
        first=first,
        last=last,
        removed=_removed_before(label_set, records),
        merged_shards=merge_shards(label_set, records),
        deleted=tuple(sorted({name for record in records for name in record.deleted})),
        dropped=is_dropped(records),
        partition_bits=bits[-1] if bits else None,
        created_at=utc_now(),
        provenance=records[-1].provenance,
    )
    label_set.log.create(merged, merged=True)
    try:
        label_set.log.shards(merged)
        for index in merged.indexes:
            label_set.open_index(index).close()
    except FileNotFoundError:  # gc took one for a leftover, before the record was there
        label_set.objects.delete(label_set.log.path(first, last))


def merge_shards(label_set: LabelSet, records: Sequence[CommitRecord]) -> MergedShards | None:
    """Write what is left of the shards that some records add; None if nothing is."""
    index = SampleIndex(label_set.open_index, label_set.log.shards)
    for record in records:
        index.add(record)
    place = np.cumsum(index.alive, dtype=np.int32) - np.int32(1)
    indexes = [
        write_index(label_set, replace(entries, shard=place[entries.shard]))
        for entries in index.live_entries()
    ]
    return write_shard_table(label_set, index.live_shards, indexes) if indexes else None


def _removed_before(label_set: LabelSet, records: Sequence[CommitRecord]) -> tuple[Name, ...]:
    """Shards that the records remove and did not add themselves."""
    if not any(record.removed for record in records):
        return ()
    added: set[Name] = set()
    removed: dict[Name, None] = {}
    for record in records:
        removed.update((name, None) for name in record.removed if name not in added)
        added.difference_update(record.removed)
        added.update(names_of(label_set.log.shards(record)))
    return tuple(removed)
