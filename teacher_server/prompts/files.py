"""Rows of prompt files, as plain dictionaries."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import InputError
from teacher_server.prompts.bad_rows import BadRowError

BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")


def raw_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRowError]]:
    """(line, row) of a file or dataset; lines count from 1.

    Arrow has no missing fields, only null ones. So a null in a Parquet file or a dataset, however
    deep, is a field that is not there; a null in JSON stays.

    Raises:
        InputError: if the file does not exist, is of an unknown kind or cannot be read.
    """
    if path.is_dir():
        yield from enumerate(_saved_dataset(path), start=1)
    elif not path.is_file():
        raise InputError(f"prompt file {str(path)!r} does not exist (read from {Path.cwd()})")
    elif path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
    elif path.suffix in (".jsonl", ".ndjson"):
        with path.open("rb") as stream:
            for line, data in enumerate(stream, start=1):
                # some editors sign UTF-8 files; anywhere else the character is content
                text = data.removeprefix(BOM) if line == 1 else data
                if text.strip():
                    yield line, _json_row(text)
    else:
        raise InputError(
            f"prompt file {str(path)!r} is of an unknown kind; "
            "use .jsonl, .parquet or the directory of a dataset saved to disk"
        )


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from map(_without_nulls, batch.to_pylist())
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"prompt file {str(path)!r} cannot be read: {error}") from error


def _json_row(data: bytes) -> dict[str, Any] | BadRowError:
    try:
        # without the line break: what is missing is missing at the end of this line
        row = json.loads(data.decode("utf-8").rstrip("\r\n"))
        halved = b"\\ud" in data.lower() and _SURROGATE.search(json.dumps(row, ensure_ascii=False))
    except UnicodeDecodeError as error:
        return BadRowError(f"not valid UTF-8: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRowError(f"not valid JSON: {error.msg} at column {error.colno}")
    except ValueError as error:  # a number of more digits than Python reads
        return BadRowError(f"not valid JSON: {error}")
    except RecursionError:
        return BadRowError("not valid JSON: nested too deeply")
    if not isinstance(row, dict):
        return BadRowError(f"a row must be a JSON object, got {type(row).__name__}")
    if halved:
        return BadRowError("half of a surrogate pair (\\ud800 to \\udfff) is no character")
    return row


def _saved_dataset(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"reading the saved dataset {str(path)!r} needs the package `datasets`; install it"
        ) from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a dataset saved to disk: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        raise InputError(
            f"{str(path)!r} holds several splits {sorted(loaded)}; name one, "
            f"such as {path / sorted(loaded)[0]}"
        )
    yield from map(_without_nulls, loaded)


def _without_nulls(value: Any) -> Any:
    """The value without fields that are null, at any depth."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
