"""One shard: two Arrow IPC files, written whole in memory and read batch by batch.

A record batch of the labels file holds whole samples, so a single sample is read from one batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.columns import Columns, check_columns, decode_columns, encode_columns, select_rows
from storage.errors import ShardCorruptError
from storage.ipc import ArrowFile, encode_file
from storage.keys import LabelSetSpec
from storage.labels import label_kind
from storage.labels.base import DecodedLabels
from storage.samples import LabelledSample, check_rows
from storage.schema import SCALAR_FIELDS, labels_schema, samples_schema

BATCH_ROWS = 8192
"""Aim for the rows of a record batch: the unit of random access and of verification."""

SAMPLES_BATCH_ROWS = 1024
"""Samples of a record batch of the samples file, except the last one."""


@dataclass(frozen=True, slots=True)
class ShardBytes:
    """A finished shard, before it has a name."""

    labels: bytes
    samples: bytes
    batch_rows: tuple[int, ...]
    """Rows of every record batch of the labels file."""
    first_rows: npt.NDArray[np.int32]
    """int32[S]: first row of every sample in the labels file."""
    num_samples: int
    num_rows: int
    num_tokens: int


def encode_shard(samples: Sequence[LabelledSample], spec: LabelSetSpec) -> ShardBytes:
    """Encode checked samples, in the given order, into the two files of a shard."""
    rows_S = np.array([len(sample.positions_N) for sample in samples], dtype=np.int32)
    batches = list(_label_batches(samples, rows_S, spec))
    return ShardBytes(
        labels=encode_file(batches, labels_schema(spec)),
        samples=encode_file(_sample_batches(samples, rows_S, spec), samples_schema(spec)),
        batch_rows=tuple(batch.num_rows for batch in batches),
        first_rows=(np.cumsum(rows_S) - rows_S).astype(np.int32),
        num_samples=len(samples),
        num_rows=int(rows_S.sum()),
        num_tokens=sum(len(sample.response_ids_R) for sample in samples),
    )


def _label_batches(
    samples: Sequence[LabelledSample], rows_S: npt.NDArray[np.int32], spec: LabelSetSpec
) -> Iterator[pa.RecordBatch]:
    """Batches of about BATCH_ROWS rows that end where a sample ends."""
    kind, schema = label_kind(spec.kind), labels_schema(spec)
    start = 0
    while start < len(samples):
        ends = np.cumsum(rows_S[start:])
        stop = start + max(1, int(np.searchsorted(ends, BATCH_ROWS, side="right")))
        group = samples[start:stop]
        columns: list[pa.Array] = [
            pa.array(np.repeat(np.arange(start, stop, dtype=np.int32), rows_S[start:stop]))
        ]
        for name in ("positions_N", "token_ids_N", "token_logprob_N", "token_rank_N"):
            columns.append(_concatenated(group, name))
        columns.append(_concatenated(group, "log_tail_mass_N"))
        columns += encode_columns([sample.optional for sample in group], spec)
        columns += kind.encode(
            np.concatenate([sample.topk_ids_NK for sample in group]),
            np.concatenate([sample.topk_logprobs_NK for sample in group]),
        )
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
        start = stop


def _concatenated(samples: Sequence[LabelledSample], name: str) -> pa.Array:
    return pa.array(np.concatenate([getattr(sample, name) for sample in samples]))


def _sample_batches(
    samples: Sequence[LabelledSample], rows_S: npt.NDArray[np.int32], spec: LabelSetSpec
) -> Iterator[pa.RecordBatch]:
    first_rows = (np.cumsum(rows_S) - rows_S).tolist()
    for start in range(0, len(samples), SAMPLES_BATCH_ROWS):
        stop = start + SAMPLES_BATCH_ROWS
        group = zip(samples[start:stop], first_rows[start:stop], rows_S[start:stop], strict=True)
        rows = [_sample_row(sample, first, int(count)) for sample, first, count in group]
        yield pa.RecordBatch.from_pylist(rows, schema=samples_schema(spec))


def _sample_row(sample: LabelledSample, first_row: int, num_rows: int) -> dict[str, Any]:
    masked = num_rows < len(sample.response_ids_R)
    return {
        "sample_key": sample.key,
        "prompt_key": sample.prompt_key,
        "sample_index": sample.sample_index,
        "first_row": first_row,
        "num_rows": num_rows,
        "num_tokens": len(sample.response_ids_R),
        "prompt_ids": sample.prompt_ids_P,
        # with every position labelled, the rows of the label table are the response
        "response_ids": sample.response_ids_R if masked else None,
        "label_mask": sample.label_mask_R if masked else None,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
    }


class ShardReader:
    """Decodes the samples of a shard from its two open files.

    Args:
        labels: The labels file.
        samples: The samples file.
        spec: Of the label set.
        batch_rows: Rows of every batch of the labels file, as recorded.
        name: What to call the shard in errors.

    Raises:
        ShardCorruptError: if the labels file has another number of batches.
    """

    def __init__(
        self,
        labels: ArrowFile,
        samples: ArrowFile,
        spec: LabelSetSpec,
        batch_rows: Sequence[int],
        *,
        name: str,
    ) -> None:
        self._labels, self._samples, self._spec, self._name = labels, samples, spec, name
        self._batch_rows = batch_rows
        self._kind = label_kind(spec.kind)
        if labels.num_batches != len(batch_rows):
            raise ShardCorruptError(
                f"{name} has {labels.num_batches} batches, its record says {len(batch_rows)}; "
                "run `distill repair`"
            )

    def batch(self, number: int) -> list[tuple[int, LabelledSample]]:
        """The samples of one record batch of the labels file, with their rows in the samples file.

        Raises:
            ShardCorruptError: if the two files do not fit each other.
            BadLabelError: if a label cannot be one, whatever its checksum says.
        """
        batch = self._labels.batch(number)
        if len(batch) != self._batch_rows[number]:
            raise ShardCorruptError(
                f"{self._name}: batch {number} has {len(batch)} rows, its record says "
                f"{self._batch_rows[number]}; run `distill repair`"
            )
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        ids_NK, logprobs_NK = self._kind.decode(columns)
        scalars = {field.name: columns[field.name].to_numpy() for field in SCALAR_FIELDS}
        name = f"{self._name}, batch {number}"
        check_rows(scalars, ids_NK, logprobs_NK, self._spec, name=name)
        optional = decode_columns(columns, self._spec, name=name)
        check_columns(optional, scalars["log_tail_mass"], self._spec, name=name)
        of_sample = scalars["sample"]
        starts = np.flatnonzero(np.diff(of_sample, prepend=-1)).tolist()
        spans = [
            slice(start, stop) for start, stop in zip(starts, [*starts[1:], None], strict=True)
        ]
        rows = of_sample[starts].tolist()
        return [
            (row, self._sample(facts, span, scalars, (ids_NK, logprobs_NK), optional))
            for row, facts, span in zip(rows, self._facts(rows), spans, strict=True)
        ]

    def _sample(
        self,
        facts: dict[str, Any],
        span: slice,
        scalars: dict[str, np.ndarray],
        topk: DecodedLabels,
        optional: Columns,
    ) -> LabelledSample:
        response = facts["response_ids"]
        positions_N = scalars["position"][span]
        if len(positions_N) != facts["num_rows"]:
            raise ShardCorruptError(
                f"{self._name}: sample {facts['sample_key']} has {len(positions_N)} label rows, "
                f"its samples file says {facts['num_rows']}; run `distill repair`"
            )
        if response is not None:
            self._check_mask(facts, positions_N, scalars["token_id"][span])
        return LabelledSample(
            key=str(facts["sample_key"]),
            sample_index=int(facts["sample_index"]),
            prompt_ids_P=np.asarray(facts["prompt_ids"], dtype=np.int32),
            response_ids_R=scalars["token_id"][span]
            if response is None
            else np.asarray(response, dtype=np.int32),
            positions_N=positions_N,
            token_logprob_N=scalars["token_logprob"][span],
            token_rank_N=scalars["token_rank"][span],
            log_tail_mass_N=scalars["log_tail_mass"][span],
            topk_ids_NK=topk[0][span],
            topk_logprobs_NK=topk[1][span],
            optional=select_rows(optional, span),
            finish_reason=str(facts["finish_reason"]),
            stop_reason=None if facts["stop_reason"] is None else str(facts["stop_reason"]),
        )

    def _check_mask(
        self, facts: dict[str, Any], positions_N: np.ndarray, token_ids_N: np.ndarray
    ) -> None:
        """Of a response that is labelled in parts, both files must tell the same."""
        response_R, mask_R = facts["response_ids"], facts["label_mask"]
        if (
            mask_R is None
            or not np.array_equal(np.flatnonzero(mask_R), positions_N)
            or len(mask_R) != len(response_R)
            or not np.array_equal(response_R[positions_N], token_ids_N)
        ):
            raise ShardCorruptError(
                f"{self._name}: label mask or response of sample {facts['sample_key']} do not fit "
                "its label rows; run `distill repair`"
            )

    def _facts(self, rows: list[int]) -> Iterator[dict[str, Any]]:
        """Rows of the samples file, ascending."""
        number, facts = -1, []
        for row in rows:
            if row // SAMPLES_BATCH_ROWS != number:
                number = row // SAMPLES_BATCH_ROWS
                if number >= self._samples.num_batches:
                    break
                facts = _rows(self._samples.batch(number))
            if row % SAMPLES_BATCH_ROWS >= len(facts):
                break
            yield facts[row % SAMPLES_BATCH_ROWS]
        else:
            return
        raise ShardCorruptError(
            f"{self._name}: the labels file has rows of sample {row}, which the samples file "
            "lacks; run `distill repair`"
        )


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as dictionaries; lists stay numpy arrays."""
    columns = {name: _values(batch.column(name)) for name in batch.schema.names}
    return [{name: values[row] for name, values in columns.items()} for row in range(len(batch))]


def _values(column: pa.Array) -> Sequence[object]:
    if not pa.types.is_list(column.type):
        values: list[object] = column.to_pylist()
        return values
    offsets = column.offsets.to_numpy()
    items = column.values.to_numpy(zero_copy_only=False)
    valid = column.is_valid().to_pylist()
    spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), valid, strict=True)
    return [items[start:stop] if there else None for start, stop, there in spans]
