"""Label sets as tables for other tools: Arrow, polars, pandas, DuckDB, Hugging Face datasets."""

import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.columns import arrow_columns
from storage.errors import LabelStoreError, ShardCorruptError
from storage.labels import label_kind
from storage.labels.base import UNUSED_ID
from storage.schema import SCALAR_FIELDS

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    from datasets import Dataset
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

    from storage.label_set import LabelSet
    from storage.records import ShardRecord

SAMPLE_COLUMNS = ("sample_key", "prompt_key", "sample_index", "finish_reason")
"""Columns of the samples file that are repeated for every label row."""

TOPK_COLUMNS = ("topk_ids", "topk_logprobs")
"""The decoded top-k: lists of int32 ids, likeliest first, and of float32 log-probs in nats."""


def columns_of(label_set: "LabelSet") -> list[str]:
    """Names of everything that :func:`scan` can yield, in order."""
    scalars = [field.name for field in SCALAR_FIELDS if field.name != "sample"]
    return [*SAMPLE_COLUMNS, *scalars, *arrow_columns(label_set.spec), *TOPK_COLUMNS]


def schema_of(label_set: "LabelSet", columns: Sequence[str] | None = None) -> pa.Schema:
    """Names and types of what :func:`scan` yields.

    Raises:
        LabelStoreError: for an unknown column.
    """
    stored = [*label_set.table_schema("samples"), *label_set.table_schema("labels")]
    known = {field.name: field.with_nullable(True) for field in stored}
    known["topk_ids"] = pa.field("topk_ids", pa.list_(pa.int32()))
    known["topk_logprobs"] = pa.field("topk_logprobs", pa.list_(pa.float32()))
    return pa.schema([known[name] for name in _wanted(label_set, columns)])


def _wanted(label_set: "LabelSet", columns: Sequence[str] | None) -> list[str]:
    """The columns that are asked for, in order.

    Raises:
        LabelStoreError: if one is unknown.
    """
    known = columns_of(label_set)
    wanted = known if columns is None else list(columns)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise LabelStoreError(
            f"label set {label_set.key} has no column {unknown[0]!r}; it has {', '.join(known)}"
        )
    return wanted


def scan(label_set: "LabelSet", columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """All label rows of the samples that are served now, shard after shard.

    Only the columns that are asked for are read, and what is read is verified.

    Args:
        label_set: The set.
        columns: Some of :func:`columns_of`; all by default.

    Raises:
        LabelStoreError: for an unknown column.
        ShardCorruptError: if the bytes differ from what was committed, or a shard vanished
            because it was compacted and collected meanwhile.
    """
    wanted = _wanted(label_set, columns)
    for shard in label_set.live_shards():
        try:
            yield from _scan_shard(label_set, shard, wanted)
        except FileNotFoundError as error:
            raise ShardCorruptError(
                f"{error}: it was replaced while the set was scanned, or it is lost; scan again, "
                "and run `distill verify` if that does not help"
            ) from error


def _scan_shard(
    label_set: "LabelSet", shard: "ShardRecord", wanted: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    of_sample = [name for name in SAMPLE_COLUMNS if name in wanted]
    with label_set.open_table(shard, "samples") as file:
        samples = file.table(["sample_key", *(n for n in of_sample if n != "sample_key")])
    served = label_set.served_from(shard, samples["sample_key"].to_pylist())
    stored = [name for name in wanted if name not in (*SAMPLE_COLUMNS, *TOPK_COLUMNS)]
    if any(name in wanted for name in TOPK_COLUMNS):
        stored += [field.name for field in label_kind(label_set.spec.kind).fields()]
    with label_set.open_table(shard, "labels") as file:
        for batch in file.batches(["sample", *stored]):
            mask = pa.array(served[batch.column("sample").to_numpy()])
            yield _batch(label_set, batch.filter(mask), samples, wanted)


def _batch(
    label_set: "LabelSet", batch: pa.RecordBatch, samples: pa.Table, wanted: Sequence[str]
) -> pa.RecordBatch:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    if any(name in wanted for name in TOPK_COLUMNS):
        columns |= _topk(label_set, columns)
    rows = columns["sample"]
    for name in SAMPLE_COLUMNS:
        if name in wanted:
            columns[name] = pc.take(samples[name].combine_chunks(), rows)
    return pa.RecordBatch.from_arrays([columns[name] for name in wanted], names=list(wanted))


def _topk(label_set: "LabelSet", columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
    ids_NK, logprobs_NK = label_kind(label_set.spec.kind).decode(columns)
    used = ids_NK != UNUSED_ID
    offsets = pa.array(np.append(0, np.cumsum(used.sum(axis=1))).astype(np.int32))
    return {
        "topk_ids": pa.ListArray.from_arrays(offsets, pa.array(ids_NK[used])),
        "topk_logprobs": pa.ListArray.from_arrays(offsets, pa.array(logprobs_NK[used])),
    }


def to_arrow(label_set: "LabelSet", columns: Sequence[str] | None = None) -> pa.Table:
    """All label rows as one Arrow table; see :func:`scan` for columns and errors."""
    schema = schema_of(label_set, columns)
    batches = [batch.cast(schema) for batch in scan(label_set, columns)]
    return pa.Table.from_batches(batches, schema=schema)


def to_polars(label_set: "LabelSet", columns: Sequence[str] | None = None) -> "pl.DataFrame":
    """All label rows as a polars frame (needs the package ``polars``)."""
    polars = _package("polars", "to_polars")
    frame: pl.DataFrame = polars.from_arrow(to_arrow(label_set, columns))
    return frame


def to_pandas(label_set: "LabelSet", columns: Sequence[str] | None = None) -> "pd.DataFrame":
    """All label rows as a pandas frame (needs the package ``pandas``)."""
    _package("pandas", "to_pandas")
    frame: pd.DataFrame = to_arrow(label_set, columns).to_pandas()
    return frame


def to_datasets(label_set: "LabelSet", columns: Sequence[str] | None = None) -> "Dataset":
    """All label rows as a Hugging Face dataset (needs the package ``datasets``)."""
    datasets = _package("datasets", "to_datasets")
    return datasets.Dataset(to_arrow(label_set, columns))


def to_duckdb(
    label_set: "LabelSet",
    columns: Sequence[str] | None = None,
    *,
    connection: "DuckDBPyConnection | None" = None,
) -> "DuckDBPyRelation":
    """Label rows as a relation of DuckDB, which reads what a query of it needs when it runs.

    Args:
        label_set: The set.
        columns: Some of :func:`columns_of`; all by default.
        connection: Where the relation lives; a new database in memory by default.

    Raises:
        LabelStoreError: for an unknown column. Errors of reading come as errors of DuckDB.
    """
    duckdb = _package("duckdb", "to_duckdb")
    from storage.sql.export_rows import ExportRows

    lives_in = duckdb.connect() if connection is None else connection
    schema = schema_of(label_set, columns)
    rows = lives_in.from_arrow(ExportRows(label_set, schema))
    relation: DuckDBPyRelation = rows.select(*map(duckdb.ColumnExpression, schema.names))
    return relation


def _package(name: str, method: str) -> Any:
    """An optional package.

    Raises:
        LabelStoreError: if it is not installed, saying how to.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise LabelStoreError(
            f"{method} needs the package {name}, which is not installed: pip install {name}"
        ) from error
