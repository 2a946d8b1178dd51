"""The immutable files of a label set: created once, durable, under names nobody else uses."""

import uuid

import xxhash

from storage.index import Entries, encode_index
from storage.label_set import LabelSet
from storage.records import FileRecord, IndexRecord, Name


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


def write_index(label_set: LabelSet, entries: Entries | None) -> IndexRecord | None:
    """Create the index file of a record; None if there is nothing to find."""
    if entries is None or not len(entries):
        return None
    data, first_keys = encode_index(entries)
    name = new_name(data)
    file = write_file(label_set, label_set.index_path(name), data)
    return IndexRecord(name=name, file=file, num_samples=len(entries), first_keys=first_keys)
