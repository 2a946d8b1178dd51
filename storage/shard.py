"""One shard: two Arrow IPC files, written whole in memory and verified on every read.

Every record batch carries the xxh3 digest of each of its columns, so a reader that projects a few
columns verifies exactly what it reads. pyarrow alone does not notice a flipped bit.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from storage.errors import FormatError, ShardCorruptError
from storage.keys import LabelSetSpec
from storage.labels import LABEL_KINDS
from storage.samples import LabelledSample
from storage.schema import FORMAT_VERSION, labels_schema, samples_schema

BATCH_ROWS = 4096
"""Aim for the rows of a record batch: the unit of random access and of verification."""

ZSTD_LEVEL = 1
"""Higher levels make byte planes larger and slower (measured on real labels)."""

CHECKSUM_FIELD = b"distillcache.xxh3"
BATCH_FIELD = b"distillcache.batch"
"""Number of the batch in its file: a damaged footer may point to a batch twice."""


@dataclass(frozen=True, slots=True)
class ShardBytes:
    """A finished shard, before it has a name."""

    labels: bytes
    samples: bytes
    num_samples: int
    num_rows: int
    num_tokens: int


def encode_shard(samples: Sequence[LabelledSample], spec: LabelSetSpec) -> ShardBytes:
    """Encode checked samples, in the given order, into the two files of a shard."""
    rows_per_sample = np.array([len(sample.positions_N) for sample in samples])
    return ShardBytes(
        labels=_to_ipc(_label_batches(samples, rows_per_sample, spec), labels_schema(spec)),
        samples=_to_ipc([_samples_batch(samples, rows_per_sample, spec)], samples_schema(spec)),
        num_samples=len(samples),
        num_rows=int(rows_per_sample.sum()),
        num_tokens=sum(len(sample.response_ids_R) for sample in samples),
    )


def _label_batches(
    samples: Sequence[LabelledSample], rows_per_sample: np.ndarray, spec: LabelSetSpec
) -> Iterator[pa.RecordBatch]:
    """Batches of about BATCH_ROWS rows that end where a sample ends."""
    start = 0
    while start < len(samples):
        ends = np.cumsum(rows_per_sample[start:])
        stop = start + max(1, int(np.searchsorted(ends, BATCH_ROWS, side="right")))
        group = samples[start:stop]
        columns: list[pa.Array] = [
            pa.array(np.repeat(np.arange(start, stop, dtype=np.int32), rows_per_sample[start:stop]))
        ]
        for name in ("positions_N", "token_ids_N", "token_logprob_N", "token_rank_N"):
            columns.append(_concatenated(group, name))
        columns.append(_concatenated(group, "log_tail_mass_N"))
        columns += [_concatenated(group, f"{name}_N") for name in spec.columns]
        columns += LABEL_KINDS[spec.kind.type](spec.kind).encode(
            np.concatenate([sample.topk_ids_NK for sample in group]),
            np.concatenate([sample.topk_logprobs_NK for sample in group]),
        )
        yield pa.RecordBatch.from_arrays(columns, schema=labels_schema(spec))
        start = stop


def _concatenated(samples: Sequence[LabelledSample], name: str) -> pa.Array:
    return pa.array(np.concatenate([getattr(sample, name) for sample in samples]))


def _samples_batch(
    samples: Sequence[LabelledSample], rows_per_sample: np.ndarray, spec: LabelSetSpec
) -> pa.RecordBatch:
    first_rows = np.cumsum(rows_per_sample) - rows_per_sample
    rows = [
        {
            "sample_key": sample.key,
            "prompt_key": sample.prompt_key,
            "sample_index": sample.sample_index,
            "first_row": int(first),
            "num_rows": int(count),
            "num_tokens": len(sample.response_ids_R),
            "prompt_ids": sample.prompt_ids_P,
            # with every position labelled, the rows of the label table are the response
            "response_ids": sample.response_ids_R if count < len(sample.response_ids_R) else None,
            "label_mask": sample.label_mask_R if count < len(sample.response_ids_R) else None,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        for sample, first, count in zip(samples, first_rows, rows_per_sample, strict=True)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=samples_schema(spec))


def _to_ipc(batches: Iterator[pa.RecordBatch] | list[pa.RecordBatch], schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", ZSTD_LEVEL))
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for index, batch in enumerate(batches):
            digests = {
                name: column_digest(column)
                for name, column in zip(schema.names, batch.columns, strict=True)
            }
            metadata = {BATCH_FIELD: str(index), CHECKSUM_FIELD: json.dumps(digests)}
            writer.write_batch(batch, custom_metadata=metadata)
    return sink.getvalue()


def column_digest(column: pa.Array) -> str:
    """xxh3 of the *values* of a column: type, length, validity and content.

    Independent of compression, padding and slicing, so the digest of a decoded column equals the
    one taken before it was written.
    """
    state = xxhash.xxh3_64()
    _update_digest(state, column)
    return state.hexdigest()


def _update_digest(state: xxhash.xxh3_64, column: pa.Array) -> None:
    state.update(f"{column.type}|{len(column)}|{column.null_count}".encode())
    if column.null_count:
        state.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        _update_digest(state, column.flatten())
    elif pa.types.is_list(kind):
        state.update(_lengths(pc.list_value_length(column)))
        _update_digest(state, column.flatten())
    elif pa.types.is_string(kind):
        state.update(_lengths(pc.binary_length(column)))
        state.update("".join(column.drop_null().to_pylist()).encode())
    elif pa.types.is_boolean(kind):
        state.update(column.to_numpy(zero_copy_only=False).tobytes())
    else:
        state.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=True)).data)


def _lengths(lengths: pa.Array) -> bytes:
    values: np.ndarray = lengths.fill_null(-1).to_numpy(zero_copy_only=False)
    return values.tobytes()


class ShardFile:
    """A verified reader of one of the two files of a shard.

    Args:
        data: The whole file.
        name: What to call it in errors: store and path.
        schema: Exactly what the file must hold.

    Raises:
        ShardCorruptError: if the bytes are not a complete Arrow IPC file.
        FormatError: if the schema or the format version differs.
    """

    def __init__(self, data: bytes, *, name: str, schema: pa.Schema) -> None:
        self._data, self._name = pa.py_buffer(data), name
        try:
            with pa.ipc.open_file(self._data) as reader:
                found, self.num_batches = reader.schema, reader.num_record_batches
        except (pa.ArrowException, OSError) as error:
            raise ShardCorruptError(
                f"{name} is not a complete Arrow IPC file ({error}); run `distill verify`"
            ) from error
        if not found.equals(schema, check_metadata=True):
            raise FormatError(
                f"{name} does not have the schema of format {FORMAT_VERSION} and of its label "
                f"set: wanted {schema.to_string()}, found {found.to_string()}"
            )
        self.schema = schema

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Batches with the given columns (all by default), each verified before it is yielded.

        Raises:
            ShardCorruptError: naming file, batch and column.
        """
        for index in range(self.num_batches):
            yield self.batch(index, columns)

    def batch(self, index: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """One verified record batch; see :meth:`batches`."""
        names = self.schema.names if columns is None else columns
        options = pa.ipc.IpcReadOptions(
            included_fields=[self.schema.get_field_index(name) for name in names]
        )
        try:
            with pa.ipc.open_file(self._data, options=options) as reader:
                batch, metadata = reader.get_batch_with_custom_metadata(index)
            batch.validate(full=True)  # offsets that leave their buffer would crash the process
            digests = json.loads(metadata[CHECKSUM_FIELD])
            number = int(metadata[BATCH_FIELD])
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise ShardCorruptError(
                f"{self._name}: batch {index} is unreadable: {error}; run `distill verify`"
            ) from error
        if number != index:
            raise ShardCorruptError(
                f"{self._name}: batch {number} stands where batch {index} should; "
                "run `distill verify`"
            )
        batch = batch.select(names)
        for name in names:
            found = column_digest(batch.column(name))
            if digests.get(name) != found:
                raise ShardCorruptError(
                    f"{self._name}: column {name!r} of batch {index} is damaged "
                    f"(checksum {found}, committed {digests.get(name)}); run `distill verify`"
                )
        return batch

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All verified batches as one table."""
        batches = list(self.batches(columns))
        fields = [self.schema.field(name) for name in columns or self.schema.names]
        return pa.Table.from_batches(batches, schema=pa.schema(fields))
