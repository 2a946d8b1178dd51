"""Merged records: the sum of many commit records, with one index for all of their samples."""

import contextlib
from dataclasses import replace

import numpy as np

from storage.durable import write_index
from storage.errors import LabelStoreError
from storage.index import SampleIndex, concat
from storage.label_set import LabelSet
from storage.log import is_dropped, merge_ranges
from storage.provenance import utc_now
from storage.records import CommitRecord, Name

MERGE_SAMPLES = 2**22
"""Most samples of a merged index: sorting them takes about half a gigabyte."""


def merge_due(label_set: LabelSet, last: int) -> None:
    """Make the merged records that are due once record ``last`` exists.

    They only make reading quicker: a failure here must not fail the commit before it.
    """
    with contextlib.suppress(LabelStoreError, FileNotFoundError):
        for first, end in merge_ranges(last):
            merge(label_set, first, end)


def merge(label_set: LabelSet, first: int, last: int) -> None:
    """Sum up the records ``first`` to ``last`` in one.

    Raises:
        LabelStoreError: if a record or an index cannot be read, or the result not be written.
    """
    records = list(label_set.log.walk(first, last))
    if sum(r.index.num_samples for r in records if r.index is not None) > MERGE_SAMPLES:
        return
    index = SampleIndex(label_set.open_index)
    for record in records:
        index.add(record)
    parts = list(index.live_entries())
    entries = concat(parts) if parts else None
    if entries is not None:
        place = np.cumsum(index.alive, dtype=np.int32) - 1
        entries = replace(entries, shard=place[entries.shard]).sorted()
    bits = [r.partition_bits for r in records if r.partition_bits is not None]
    merged = CommitRecord(
        label_set=label_set.key,
        first=first,
        last=last,
        removed=_removed_before(records),
        shards=tuple(index.live_shards),
        index=write_index(label_set, entries),
        deleted=tuple(sorted({name for record in records for name in record.deleted})),
        dropped=is_dropped(records),
        partition_bits=bits[-1] if bits else None,
        created_at=utc_now(),
        provenance=records[-1].provenance,
    )
    label_set.log.create(merged, merged=True)
    try:
        if merged.index is not None:
            label_set.open_index(merged.index).close()
    except FileNotFoundError:  # gc took it for a leftover, before the record was there
        label_set.objects.delete(label_set.log.path(first, last))


def _removed_before(records: list[CommitRecord]) -> tuple[Name, ...]:
    """Shards that the records remove and did not add themselves."""
    added: set[Name] = set()
    removed: dict[Name, None] = {}
    for record in records:
        removed.update((name, None) for name in record.removed if name not in added)
        added.difference_update(record.removed)
        added.update(shard.name for shard in record.shards)
    return tuple(removed)
