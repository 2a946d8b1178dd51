"""The view ``labels``: one row per labelled token of every sample that is served."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.columns import scalar_columns
from storage.keys import LabelSetSpec
from storage.schema import SCALAR_FIELDS
from storage.sql.scan import LazyDataset, Request
from storage.sql.snapshot import (
    SAMPLE_FIELDS,
    SET_FIELDS,
    OpenShard,
    ShardSamples,
    Snapshot,
)
from storage.sql.sources import SOURCE_FIELDS

OF_SAMPLES = [*SET_FIELDS, *SAMPLE_FIELDS, SOURCE_FIELDS[0]]
"""Columns that are the same for all rows of a sample."""

_STORED = [field.with_nullable(True) for field in SCALAR_FIELDS if field.name != "sample"]
_NAMES_OF_SAMPLES = frozenset(field.name for field in OF_SAMPLES)


def labels_view_schema(specs: Sequence[LabelSetSpec]) -> pa.Schema:
    """Columns of the view; those that some set lacks are null there."""
    optional = dict.fromkeys(name for spec in specs for name in scalar_columns(spec.columns))
    token = _STORED.index(next(field for field in _STORED if field.name == "token_id")) + 1
    return pa.schema(
        [
            *OF_SAMPLES,
            *_STORED[:token],
            pa.field("token", pa.string()),
            *_STORED[token:],
            *(pa.field(name, pa.float32()) for name in optional),
        ]
    )


@dataclass(frozen=True)
class LabelBatch:
    """The rows of one batch of a labels file that belong to samples that are wanted."""

    columns: Mapping[str, pa.Array]
    """Stored columns of these rows."""
    sample_N: npt.NDArray[np.int32]
    """int32[N]: row of each row's sample; empty if no column of samples is needed."""


class LabelRows(LazyDataset):
    """Label rows of some label sets.

    Args:
        snapshots: The sets.
        failures: Where errors are kept.
    """

    def __init__(self, snapshots: Sequence[Snapshot], failures: list[BaseException]) -> None:
        self._snapshots = snapshots
        schema = labels_view_schema([snapshot.label_set.spec for snapshot in snapshots])
        super().__init__(schema, "position", failures)

    def batches(self, request: Request) -> Iterator[pa.RecordBatch]:
        """See the base class."""
        for snapshot in self._snapshots:
            for shard in snapshot.open_shards(request):
                yield from _of_shard(snapshot, shard, request)


def _of_shard(snapshot: Snapshot, shard: OpenShard, request: Request) -> Iterator[pa.RecordBatch]:
    samples, wanted_S = samples_of(snapshot, shard, request)
    if not wanted_S.any():
        return
    decided = _NAMES_OF_SAMPLES.issuperset(request.condition_columns)
    first = () if decided else request.condition_columns
    for number in samples.batches(request, wanted_S, shard.record.batch_rows):
        reader = _Batch(snapshot, shard, samples, number)
        rows = None if wanted_S.all() else np.flatnonzero(wanted_S[reader.sample_N])
        if not decided and request.condition is not None:
            columns = {name: reader.column(name, rows) for name in first}
            meets = request.rows(columns)
            rows = meets if rows is None else rows[meets]
        if rows is not None and len(rows) == 0:
            continue
        arrays = [reader.column(name, rows) for name in request.columns]
        yield record_batch(arrays, request, reader.num_rows if rows is None else len(rows))


def samples_of(
    snapshot: Snapshot, shard: OpenShard, request: Request
) -> tuple[ShardSamples, npt.NDArray[np.bool_]]:
    """What is known of the samples of a shard, and bool[S]: which are wanted."""
    named = {*request.columns, *request.condition_columns} & _NAMES_OF_SAMPLES
    samples = snapshot.sample_columns(shard, sorted(named))
    return samples, samples.wanted(request)


def record_batch(arrays: list[pa.Array], request: Request, num_rows: int) -> pa.RecordBatch:
    """The batch of a request; one without columns has only a length."""
    if not arrays:
        empty = pa.RecordBatch.from_arrays([pa.nulls(num_rows)], names=["none"])
        return empty.select([])
    return pa.RecordBatch.from_arrays(arrays, schema=request.projected)


class _Batch:
    """One batch of a labels file, of which columns are read when they are needed."""

    def __init__(
        self, snapshot: Snapshot, shard: OpenShard, samples: ShardSamples, number: int
    ) -> None:
        self._snapshot, self._shard, self._samples = snapshot, shard, samples
        self._number = number
        self._read: dict[str, pa.Array] = {}
        self._stored = set(shard.labels.schema.names)
        self.num_rows = shard.record.batch_rows[number]

    @property
    def sample_N(self) -> npt.NDArray[np.int32]:
        """int32[N]: row of each row's sample in the samples file."""
        found: npt.NDArray[np.int32] = self._column("sample").to_numpy()
        return found

    def column(self, name: str, rows: npt.NDArray[np.int64] | None) -> pa.Array:
        """A column of the view, for some rows or all."""
        if name == "token":
            return self._snapshot.texts.of_tokens(self.column("token_id", rows))
        if name in _NAMES_OF_SAMPLES:
            sample_N = self.sample_N if rows is None else self.sample_N[rows]
            return self._samples.columns[name].take(pa.array(sample_N))
        if name not in self._stored:
            return pa.nulls(self.num_rows if rows is None else len(rows), pa.float32())
        found = self._column(name)
        return found if rows is None else found.take(pa.array(rows))

    def _column(self, name: str) -> pa.Array:
        if name not in self._read:
            self._read[name] = self._shard.labels.batch(self._number, [name]).column(0)
        return self._read[name]
