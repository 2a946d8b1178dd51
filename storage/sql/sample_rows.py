"""The view ``samples``: one row per sample that is served."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.sql.labels import record_batch
from storage.sql.scan import LazyDataset, Request
from storage.sql.snapshot import SAMPLE_FIELDS, SET_FIELDS, OpenShard, ShardSamples, Snapshot
from storage.sql.sources import SOURCE_FIELDS

SAMPLES_VIEW_SCHEMA = pa.schema(
    [
        *SET_FIELDS,
        *SAMPLE_FIELDS,
        pa.field("stop_reason", pa.string()),
        *SOURCE_FIELDS,
        pa.field("num_prompt_tokens", pa.int32()),
        pa.field("num_tokens", pa.int32()),
        pa.field("num_rows", pa.int32()),
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("response_ids", pa.list_(pa.int32())),
        pa.field("label_mask", pa.list_(pa.bool_())),
        pa.field("prompt", pa.string()),
        pa.field("response", pa.string()),
    ]
)
"""``num_tokens`` counts response tokens, ``num_rows`` labelled ones; ``label_mask`` is null where
every token of the response is labelled; ``prompt`` and ``response`` are text."""

_MADE_OF = {
    "num_prompt_tokens": "prompt_ids",
    "prompt": "prompt_ids",
    "response": "response_ids",
}
"""Stored columns from which others are made."""


class SampleRows(LazyDataset):
    """Samples of some label sets.

    Args:
        snapshots: The sets.
        failures: Where errors are kept.
    """

    def __init__(self, snapshots: Sequence[Snapshot], failures: list[BaseException]) -> None:
        super().__init__(SAMPLES_VIEW_SCHEMA, "sample_index", failures)
        self._snapshots = snapshots

    def batches(self, request: Request) -> Iterator[pa.RecordBatch]:
        """See the base class."""
        for snapshot in self._snapshots:
            for shard in snapshot.open_shards(request):
                view = _Shard(snapshot, shard, request)
                rows = view.rows(request)
                if len(rows):
                    arrays = [view.column(name, rows) for name in request.columns]
                    yield record_batch(arrays, request, len(rows))


class _Shard:
    """The samples of one shard."""

    def __init__(self, snapshot: Snapshot, shard: OpenShard, request: Request) -> None:
        self._snapshot, self._shard = snapshot, shard
        names = {*request.columns, *request.condition_columns}
        stored = {_MADE_OF.get(name, name) for name in names}
        self._samples: ShardSamples = snapshot.sample_columns(shard, sorted(stored))

    def rows(self, request: Request) -> npt.NDArray[np.int64]:
        """Numbers of the samples that are served and meet the condition."""
        rows = np.flatnonzero(self._samples.served_S)
        if request.condition is None or not len(rows):
            return rows
        names = request.condition_columns or ("sample_key",)
        return rows[request.rows({name: self.column(name, rows) for name in names})]

    def column(self, name: str, rows: npt.NDArray[np.int64]) -> pa.Array:
        """A column of the view for some samples."""
        match name:
            case "num_prompt_tokens":
                return self.column("prompt_ids", rows).value_lengths()
            case "prompt" | "response":
                return self._snapshot.texts.of_lists(self.column(_MADE_OF[name], rows))
            case "response_ids":
                return self._responses(rows)
        return self._samples.columns[name].take(pa.array(rows))

    def _responses(self, rows: npt.NDArray[np.int64]) -> pa.Array:
        """Response tokens; those of a response that is labelled throughout are its label rows."""
        stored = self._samples.columns["response_ids"].take(pa.array(rows))
        first_S = self._samples.columns["first_row"].to_numpy()
        num_S = self._samples.columns["num_rows"].to_numpy()
        ends = np.cumsum(self._shard.record.batch_rows)
        tokens: dict[int, npt.NDArray[np.int32]] = {}
        found: list[npt.NDArray[np.int32]] = []
        for row, there in zip(rows.tolist(), stored.is_valid().to_pylist(), strict=True):
            if there:
                found.append(stored[len(found)].values.to_numpy())
                continue
            number = int(np.searchsorted(ends, first_S[row], side="right"))
            if number not in tokens:
                batch = self._shard.labels.batch(number, ["token_id"])
                tokens[number] = batch.column(0).to_numpy()
            start = first_S[row] - (ends[number] - self._shard.record.batch_rows[number])
            found.append(tokens[number][start : start + num_S[row]])
        offsets = np.append(0, np.cumsum([len(ids) for ids in found])).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(found)))
