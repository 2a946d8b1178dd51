"""The shards of a merged record as a file: small, and read only by those who need a shard.

Planning asks which samples exist, not where they lie. It reads the record and its indexes, and
never this table, which grows with the set.
"""

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from storage.errors import FormatError, ShardCorruptError
from storage.ipc import ArrowFile, encode_file
from storage.objects import Objects
from storage.records import FileRecord, MergedShards, Name, ShardRecord
from storage.schema import FORMAT_VERSION

BATCH_SHARDS = 2**14
"""Shards of a record batch."""

TABLES = ("labels", "samples")

SHARD_TABLE_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("partition", pa.string(), nullable=False),
        pa.field("labels_bytes", pa.int64(), nullable=False),
        pa.field("labels_xxh3_128", pa.string(), nullable=False),
        pa.field("samples_bytes", pa.int64(), nullable=False),
        pa.field("samples_xxh3_128", pa.string(), nullable=False),
        pa.field("batch_rows", pa.list_(pa.int32()), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("since", pa.int64(), nullable=False),
    ],
    metadata={"distillcache.format": str(FORMAT_VERSION), "distillcache.table": "shards"},
)
"""One row per shard, in the order in which indexes number them."""


def encode_shard_table(shards: Sequence[ShardRecord]) -> bytes:
    """The bytes of a shard table."""
    rows = [_row(shard) for shard in shards]
    whole = pa.RecordBatch.from_pylist(rows, schema=SHARD_TABLE_SCHEMA)
    starts = range(0, len(rows), BATCH_SHARDS)
    batches = [whole.slice(start, BATCH_SHARDS) for start in starts]
    return encode_file(batches, SHARD_TABLE_SCHEMA)


def _row(shard: ShardRecord) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: getattr(shard, name)
        for name in SHARD_TABLE_SCHEMA.names
        if not name.startswith(TABLES)
    }
    for table in TABLES:
        file = shard.file(table)
        row[f"{table}_bytes"], row[f"{table}_xxh3_128"] = file.num_bytes, file.xxh3_128
    return row


class ShardTable(Sequence[ShardRecord]):
    """The shards of a merged record; a shard's record is made when it is asked for.

    Args:
        table: All rows of the file.
        name: What to call the file in errors.
    """

    def __init__(self, table: pa.Table, *, name: str) -> None:
        self._table, self._name = table, name

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, number: int) -> ShardRecord: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[ShardRecord]: ...

    def __getitem__(self, number: int | slice) -> ShardRecord | Sequence[ShardRecord]:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        (row,) = self._table.slice(number, 1).to_pylist()
        return self._record(row)

    def __iter__(self) -> Iterator[ShardRecord]:
        for batch in self._table.to_batches():
            for row in batch.to_pylist():
                yield self._record(row)

    @property
    def names(self) -> list[Name]:
        """Names of all shards, in order."""
        names: list[Name] = self._table["name"].to_pylist()
        return names

    @property
    def since(self) -> npt.NDArray[np.int64]:
        """int64[S]: the record that first committed the samples of each."""
        since: npt.NDArray[np.int64] = self._table["since"].to_numpy()
        return since

    def _record(self, row: dict[str, Any]) -> ShardRecord:
        for table in TABLES:
            num_bytes, digest = row.pop(f"{table}_bytes"), row.pop(f"{table}_xxh3_128")
            row[table] = FileRecord.model_construct(num_bytes=num_bytes, xxh3_128=digest)
        try:
            return ShardRecord.model_validate({**row, "batch_rows": tuple(row["batch_rows"])})
        except ValidationError as error:
            raise FormatError(f"{self._name} names no shard: {error.errors()[0]['msg']}") from error


def names_of(shards: Sequence[ShardRecord]) -> list[Name]:
    """Names of shards, in order."""
    return shards.names if isinstance(shards, ShardTable) else [shard.name for shard in shards]


def since_of(shards: Sequence[ShardRecord]) -> npt.NDArray[np.int64]:
    """int64[S]: the record that first committed the samples of each shard."""
    if isinstance(shards, ShardTable):
        return shards.since
    return np.array([shard.since for shard in shards], dtype=np.int64)


def shard_table_path(prefix: str, name: Name) -> str:
    """Where a shard table lies in the folder of its label set."""
    return f"{prefix}/index/{name}.shards.arrow"


def read_shard_table(objects: Objects, prefix: str, record: MergedShards) -> ShardTable:
    """All rows of a shard table, verified.

    Raises:
        FileNotFoundError: if it does not exist.
        ShardCorruptError: if it is not what its record says.
    """
    path = shard_table_path(prefix, record.name)
    name = f"{objects.uri}/{path}"
    data = objects.get(path)
    record.file.require(data, name=name)
    table = ArrowFile(data, name=name, schema=SHARD_TABLE_SCHEMA).table()
    if table.num_rows != record.num_shards:
        raise ShardCorruptError(
            f"{name} has {table.num_rows} shards, its record says {record.num_shards}; "
            "run `distill repair`"
        )
    return ShardTable(table, name=name)
