"""Index files: where each sample of a record lies, sorted by sample key."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.errors import BadKeyError
from storage.ipc import LZ4, encode_file
from storage.partitions import Keys
from storage.schema import FORMAT_VERSION

INDEX_BATCH_ROWS = 2**15
"""Samples of a record batch of an index: what a lookup of a single key reads."""

SAMPLE_KEY = re.compile(r"[0-9a-f]{32}")

Int32s = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

KEY_COLUMNS = ("key_hi", "key_lo")
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


def parse_keys(keys: Sequence[str] | Keys) -> Keys:
    """Sample keys from hex, uint64[N, 2]; what is parsed already is returned as it is.

    Raises:
        BadKeyError: if one is not 32 hex digits.
    """
    if isinstance(keys, np.ndarray):
        return keys
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
    first_keys = tuple(format_keys(entries.keys[list(starts)]))
    return encode_file(batches, INDEX_SCHEMA, codec=LZ4), first_keys
