"""The immutable files of a label set: created once, durable, under names nobody else uses."""

import uuid
from collections.abc import Sequence

import xxhash

from storage.index import Entries, encode_index
from storage.label_set import LabelSet
from storage.records import FileRecord, IndexRecord, MergedShards, Name, ShardRecord
from storage.shard_table import encode_shard_table, shard_table_path


def new_name(data: bytes) -> Name:
    """A name that nobody else uses; its first half tells the content."""
    return f"{xxhash.xxh3_64_hexdigest(data)}-{uuid.uuid4().hex[:8]}"


def write_file(label_set: LabelSet, path: str, data: bytes) -> FileRecord:
    """Create a file and return what a record says of it.

    Raises:
        LabelStoreError: if the store cannot be written.
    """
    label_set.objects.create_own(path, data)
    return FileRecord.of(data)


def write_index(label_set: LabelSet, entries: Entries) -> IndexRecord:
    """Create an index file.

    Args:
        label_set: Where it belongs.
        entries: Sorted by key; at least one.

    Raises:
        LabelStoreError: if the store cannot be written.
    """
    data, first_keys = encode_index(entries)
    name = new_name(data)
    file = write_file(label_set, label_set.index_path(name), data)
    return IndexRecord(name=name, file=file, num_samples=len(entries), first_keys=first_keys)


def write_shard_table(
    label_set: LabelSet, shards: Sequence[ShardRecord], indexes: Sequence[IndexRecord]
) -> MergedShards:
    """Create the table of the shards that a merged record adds.

    Args:
        label_set: Where it belongs.
        shards: At least one, in the order in which the indexes number them.
        indexes: Of their samples, in key order.

    Raises:
        LabelStoreError: if the store cannot be written.
    """
    data = encode_shard_table(shards)
    name = new_name(data)
    return MergedShards(
        name=name,
        file=write_file(label_set, shard_table_path(label_set.prefix, name), data),
        num_shards=len(shards),
        num_samples=sum(shard.num_samples for shard in shards),
        indexes=tuple(indexes),
    )
