"""The view ``topk``: one row per label row and stored rank, decoded only when it is asked for."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from storage.labels import label_kind
from storage.labels.base import UNUSED_ID
from storage.sql.labels import OF_SAMPLES, record_batch, samples_of
from storage.sql.scan import LazyDataset, Request
from storage.sql.snapshot import OpenShard, ShardSamples, Snapshot

TOPK_VIEW_SCHEMA = pa.schema(
    [
        *OF_SAMPLES,
        pa.field("position", pa.int32()),
        pa.field("rank", pa.int32()),
        pa.field("token_id", pa.int32()),
        pa.field("token", pa.string()),
        pa.field("logprob", pa.float32()),
        pa.field("is_sampled", pa.bool_()),
    ]
)
"""``rank`` counts from 1, the likeliest; ``logprob`` is in nats; ``is_sampled`` says whether the
token is the one of the response."""

_NAMES_OF_SAMPLES = frozenset(field.name for field in OF_SAMPLES)


class TopKRows(LazyDataset):
    """The stored ids of label rows of some label sets.

    Args:
        snapshots: The sets.
        failures: Where errors are kept.
    """

    def __init__(self, snapshots: Sequence[Snapshot], failures: list[BaseException]) -> None:
        super().__init__(TOPK_VIEW_SCHEMA, "rank", failures)
        self._snapshots = snapshots

    def batches(self, request: Request) -> Iterator[pa.RecordBatch]:
        """See the base class."""
        for snapshot in self._snapshots:
            width = snapshot.label_set.spec.kind.width
            rank = pc.field("rank")
            ranks = request.may_hold([rank == number + 1 for number in range(width)])
            if not ranks:
                continue
            for shard in snapshot.open_shards(request):
                samples, wanted_S = samples_of(snapshot, shard, request)
                if wanted_S.any():
                    for number in samples.batches(request, wanted_S, shard.record.batch_rows):
                        batch = _Batch(snapshot, shard, samples, number)
                        yield from _rows(batch, request, wanted_S, np.array(ranks))


def _rows(
    batch: "_Batch",
    request: Request,
    wanted_S: npt.NDArray[np.bool_],
    ranks_R: npt.NDArray[np.int64],
) -> Iterator[pa.RecordBatch]:
    """The rows of one batch of a labels file."""
    batch.choose(None if wanted_S.all() else wanted_S, ranks_R)
    decided = _NAMES_OF_SAMPLES.issuperset(request.condition_columns)
    if not decided or (request.condition is not None and not request.condition_columns):
        names = request.condition_columns or ("rank",)
        batch.keep(request.rows({name: batch.column(name) for name in names}))
    if batch.num_rows:
        arrays = [batch.column(name) for name in request.columns]
        yield record_batch(arrays, request, batch.num_rows)


class _Batch:
    """One batch of a labels file, opened out into M rows of one id each."""

    def __init__(
        self, snapshot: Snapshot, shard: OpenShard, samples: ShardSamples, number: int
    ) -> None:
        self._snapshot, self._file, self._samples = snapshot, shard.labels, samples
        self._number = number
        self._num_label_rows = shard.record.batch_rows[number]
        self._read: dict[str, pa.Array] = {}
        self._decoded: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]] | None = None
        self._row_M = np.zeros(0, np.int64)
        self._place_M = np.zeros(0, np.int64)

    @property
    def num_rows(self) -> int:
        """How many rows are chosen."""
        return len(self._row_M)

    def choose(
        self, wanted_S: npt.NDArray[np.bool_] | None, ranks_R: npt.NDArray[np.int64]
    ) -> None:
        """Choose the ids of some samples (None: of all) with some ranks, counted from 0."""
        rows_N = (
            np.arange(self._num_label_rows)
            if wanted_S is None
            else np.flatnonzero(wanted_S[self._column("sample").to_numpy()])
        )
        self._row_M = np.repeat(rows_N, len(ranks_R))
        self._place_M = np.tile(ranks_R, len(rows_N))
        if self._snapshot.label_set.spec.kind.type != "topk":  # rows of different lengths
            ids_NK, _ = self._labels()
            self.keep(np.flatnonzero(ids_NK[self._row_M, self._place_M] != UNUSED_ID))

    def keep(self, rows: npt.NDArray[np.int64]) -> None:
        """Keep some of the chosen rows, by number."""
        self._row_M, self._place_M = self._row_M[rows], self._place_M[rows]

    def column(self, name: str) -> pa.Array:
        """A column of the view for the chosen rows."""
        if name in _NAMES_OF_SAMPLES:
            sample_N = self._column("sample").to_numpy()
            return self._samples.columns[name].take(pa.array(sample_N[self._row_M]))
        match name:
            case "rank":
                return pa.array((self._place_M + 1).astype(np.int32))
            case "token":
                return self._snapshot.texts.of_tokens(self.column("token_id"))
            case "token_id":
                return pa.array(self._labels()[0][self._row_M, self._place_M])
            case "logprob":
                return pa.array(self._labels()[1][self._row_M, self._place_M])
            case "is_sampled":
                sampled = self._column("token_id").to_numpy()[self._row_M]
                return pa.array(sampled == self._labels()[0][self._row_M, self._place_M])
        return self._column(name).take(pa.array(self._row_M))

    def _labels(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        if self._decoded is None:
            kind = label_kind(self._snapshot.label_set.spec.kind)
            names = [field.name for field in kind.fields()]
            planes = self._file.batch(self._number, names)
            self._decoded = kind.decode(dict(zip(names, planes.columns, strict=True)))
        return self._decoded

    def _column(self, name: str) -> pa.Array:
        if name not in self._read:
            self._read[name] = self._file.batch(self._number, [name]).column(0)
        return self._read[name]
