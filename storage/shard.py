"""One shard: two Arrow IPC files, written whole in memory and read batch by batch.

A record batch of the labels file holds whole samples, so a single sample is read from one batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.columns import check_columns, decode_columns, encode_columns
from storage.errors import ShardCorruptError
from storage.held import HeldBatches
from storage.ipc import ArrowFile, encode_file
from storage.keys import LabelSetSpec
from storage.label_batch import LabelBatch
from storage.labels import label_kind
from storage.samples import Int32s, LabelledSample, check_rows
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
        held: Keeps batches of the samples file, which many batches of the labels file need.

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
        held: HeldBatches | None = None,
    ) -> None:
        self._labels, self._samples, self._spec, self._name = labels, samples, spec, name
        self._held: HeldBatches = HeldBatches(0) if held is None else held
        self._batch_rows = batch_rows
        self._kind = label_kind(spec.kind)
        if labels.num_batches != len(batch_rows):
            raise ShardCorruptError(
                f"{name} has {labels.num_batches} batches, its record says {len(batch_rows)}; "
                "run `distill repair`"
            )

    def batch(self, number: int) -> LabelBatch:
        """The samples of one record batch of the labels file.

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
        starts = np.flatnonzero(np.diff(scalars["sample"], prepend=-1))
        rows_S = scalars["sample"][starts].astype(np.int64)
        row_ends = np.append(starts, len(batch)).astype(np.int64)
        facts = self._samples_of(rows_S)
        keys: list[str] = facts.column("sample_key").to_pylist()
        self._check_lengths(keys, facts.column("num_rows").to_numpy(), np.diff(row_ends))
        prompt_ids, prompt_ends = _flat(facts.column("prompt_ids"))
        response_ids, response_ends = self._responses(
            keys, facts, row_ends, scalars["position"], scalars["token_id"]
        )
        return LabelBatch(
            rows_S=rows_S,
            row_ends=row_ends,
            keys=keys,
            sample_indices=facts.column("sample_index").to_pylist(),
            prompt_ids=prompt_ids,
            prompt_ends=prompt_ends,
            response_ids=response_ids,
            response_ends=response_ends,
            finish_reasons=facts.column("finish_reason").to_pylist(),
            stop_reasons=facts.column("stop_reason").to_pylist(),
            token_ids_N=scalars["token_id"],
            positions_N=scalars["position"],
            token_logprob_N=scalars["token_logprob"],
            token_rank_N=scalars["token_rank"],
            log_tail_mass_N=scalars["log_tail_mass"],
            topk_ids_NK=ids_NK,
            topk_logprobs_NK=logprobs_NK,
            optional=optional,
        )

    def _check_lengths(
        self, keys: list[str], stated_S: npt.NDArray[Any], found_S: npt.NDArray[Any]
    ) -> None:
        for place in np.flatnonzero(stated_S != found_S):
            raise ShardCorruptError(
                f"{self._name}: sample {keys[place]} has {found_S[place]} label rows, its samples "
                f"file says {stated_S[place]}; run `distill repair`"
            )

    def _responses(
        self,
        keys: list[str],
        facts: pa.RecordBatch,
        row_ends: npt.NDArray[np.int64],
        positions_N: Int32s,
        token_ids_N: Int32s,
    ) -> tuple[Int32s, npt.NDArray[np.int64]]:
        """All responses and where they end; those that are labelled in parts are checked."""
        given = facts.column("response_ids")
        if given.null_count == len(keys):
            return token_ids_N, row_ends
        masks, responses = _lists(facts.column("label_mask")), []
        for place, response_R in enumerate(_lists(given)):
            span = slice(*row_ends[place : place + 2])
            if response_R is None:
                responses.append(token_ids_N[span])
                continue
            labelled = (positions_N[span], token_ids_N[span])
            self._check_mask(keys[place], response_R, masks[place], *labelled)
            responses.append(response_R)
        ends = np.cumsum([0, *map(len, responses)], dtype=np.int64)
        return np.concatenate(responses), ends

    def _check_mask(
        self,
        key: str,
        response_R: Int32s,
        mask_R: npt.NDArray[np.bool_] | None,
        positions_N: Int32s,
        token_ids_N: Int32s,
    ) -> None:
        """Of a response that is labelled in parts, both files must tell the same."""
        if (
            mask_R is None
            or not np.array_equal(np.flatnonzero(mask_R), positions_N)
            or len(mask_R) != len(response_R)
            or not np.array_equal(response_R[positions_N], token_ids_N)
        ):
            raise ShardCorruptError(
                f"{self._name}: label mask or response of sample {key} do not fit its label rows; "
                "run `distill repair`"
            )

    def _samples_of(self, rows_S: npt.NDArray[np.int64]) -> pa.RecordBatch:
        """Some rows of the samples file, copied: they keep nothing else in memory."""
        numbers_S = rows_S // SAMPLES_BATCH_ROWS
        parts = []
        for number in np.unique(numbers_S).tolist():
            mine = rows_S[numbers_S == number]
            batch = None
            if 0 <= number < self._samples.num_batches:
                batch = self._held.get((self._name, number), partial(self._samples.batch, number))
            places = mine - number * SAMPLES_BATCH_ROWS
            if batch is None or places.max() >= len(batch):
                raise ShardCorruptError(
                    f"{self._name}: the labels file has rows of sample {mine.max()}, which the "
                    "samples file lacks; run `distill repair`"
                )
            parts.append(batch.take(pa.array(places)))
        return parts[0] if len(parts) == 1 else pa.concat_batches(parts)


def _flat(column: pa.ListArray) -> tuple[Int32s, npt.NDArray[np.int64]]:
    """The values of all lists, and where each list ends, 0 in front."""
    offsets = column.offsets.to_numpy().astype(np.int64)
    return column.flatten().to_numpy(), offsets - offsets[0]


def _lists(column: pa.ListArray) -> list[npt.NDArray[Any] | None]:
    """The lists of a column as arrays, None for null."""
    offsets = column.offsets.to_numpy()
    items = column.values.to_numpy(zero_copy_only=False)
    valid = column.is_valid().to_pylist()
    spans = zip(offsets[:-1].tolist(), offsets[1:].tolist(), valid, strict=True)
    return [items[start:stop] if there else None for start, stop, there in spans]
