"""Results of queries as files: Parquet, CSV and Arrow, each whole or not there."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from storage.errors import ConfigError
from storage.sql import Result

WRITERS: dict[str, Callable[[Path, pa.Schema], Any]] = {
    "parquet": lambda path, schema: pyarrow.parquet.ParquetWriter(path, schema, compression="zstd"),
    "csv": lambda path, schema: pyarrow.csv.CSVWriter(path, schema),
    "arrow": lambda path, schema: pa.ipc.new_file(str(path), schema),
}
"""Writers by the name of the format, which is also the ending of its files."""


def require_format(path: Path, file_format: str | None) -> str:
    """The format of a file: the given one, or what its ending says.

    Raises:
        ConfigError: if there is no such format, or a folder for the file.
    """
    found = file_format if file_format is not None else path.suffix.removeprefix(".").lower()
    if found not in WRITERS:
        what = f"--format {found}" if file_format is not None else f"the ending of {str(path)!r}"
        raise ConfigError(f"{what} is none of {', '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"the folder of {str(path)!r} does not exist; make it first")
    return found


def write_result(result: Result, path: Path, file_format: str) -> int:
    """Write all rows and return their number; the file appears whole or stays as it was.

    Lists and structures are written to CSV as JSON.

    Raises:
        ConfigError: if the file cannot be written.
    """
    is_csv = file_format == "csv"
    schema = pa.schema([_flat(field) for field in result.schema]) if is_csv else result.schema
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    num_rows = 0
    try:
        with WRITERS[file_format](temporary, schema) as writer:
            for batch in result.batches:
                writer.write_batch(_flat_batch(batch, schema) if is_csv else batch)
                num_rows += batch.num_rows
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return num_rows


def _flat(field: pa.Field) -> pa.Field:
    return pa.field(field.name, pa.string()) if pa.types.is_nested(field.type) else field


def _flat_batch(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = [
        _as_json(column) if pa.types.is_nested(column.type) else column for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _as_json(column: pa.Array) -> pa.Array:
    return pa.array(
        [None if value is None else json.dumps(value, default=str) for value in column.to_pylist()],
        pa.string(),
    )
