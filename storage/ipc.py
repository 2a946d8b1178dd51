"""Arrow IPC files that are verified on every read, column by column and batch by batch.

Every record batch carries its number and a digest of each of its columns, so a reader that
projects a few columns verifies exactly what it reads. Nothing is decompressed before its size was
found to be within bounds. pyarrow alone does neither: it does not notice a flipped bit, and it
allocates what a file asks for. ``docs/format.md`` section 6 is the specification.
"""

import io
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from storage.errors import (
    BadLabelError,
    FormatError,
    OversizedError,
    ShardCorruptError,
    WrongLabelSetError,
    WrongMagicError,
)
from storage.ipc_metadata import (
    END_OF_BATCHES,
    MAGIC,
    PREFIX_BYTES,
    TRAILER_BYTES,
    BatchLayout,
    Block,
    read_blocks,
    read_layout,
    schema_buffers,
)

MAX_BATCH_BYTES: Final = 2**30
"""Most bytes that one record batch may take in memory."""

ZSTD: Final = pa.Codec("zstd", 1)
"""Higher levels make byte planes larger and slower (measured on real labels)."""

LZ4: Final = pa.Codec("lz4")
"""Leaves what it cannot make smaller, such as keys, as it is: no time is spent on reading it."""

HEAD_BYTES: Final = 16
"""Magic, padding and the prefix of the schema message."""

STORED_RAW: Final = -1
"""Stands for the size of a buffer that is not compressed."""

PADDING_BYTES: Final = 64
"""Writers may lengthen a buffer to the next multiple of this."""

TAIL_BYTES: Final = 4096
"""Read from the end of a file at first: holds the footer of all but very long files."""

BATCH_FIELD: Final = b"distillcache.batch"
"""Number of the batch in its file: a damaged footer may point to a batch twice."""
CHECKSUM_FIELD: Final = b"distillcache.xxh3"
"""Digests of the columns, in their order, separated by blanks."""
LABEL_SET_FIELD: Final = b"distillcache.label_set"

REMEDY: Final = "run `distill verify`"
UNREADABLE: Final = (pa.ArrowException, OSError, struct.error, LookupError, TypeError, ValueError)
"""What parsing damaged bytes raises."""


def encode_file(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, *, codec: pa.Codec = ZSTD
) -> bytes:
    """An Arrow IPC file of the batches, compressed and with a digest per column.

    Args:
        batches: Of the schema.
        schema: Metadata included.
        codec: ``ZSTD``, or ``LZ4`` where reading fast matters more than size.

    Raises:
        BadLabelError: if a batch takes more than ``MAX_BATCH_BYTES``.
    """
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for index, batch in enumerate(batches):
            num_bytes = pa.ipc.get_record_batch_size(batch)
            if num_bytes > MAX_BATCH_BYTES:
                raise BadLabelError(
                    f"batch {index} of {batch.num_rows} rows takes {num_bytes} bytes, a batch may "
                    f"take {MAX_BATCH_BYTES}; write fewer rows per batch"
                )
            digests = " ".join(column_digest(column) for column in batch.columns)
            metadata = {BATCH_FIELD: str(index), CHECKSUM_FIELD: digests}
            writer.write_batch(batch, custom_metadata=metadata)
    return sink.getvalue()


# -- digests ---------------------------------------------------------------------------------------
def column_digest(column: pa.Array) -> str:
    """XXH3-64 of the *values* of a column: type, length, nulls, lengths of lists and content.

    Independent of compression, padding and slicing, so the digest of a decoded column equals the
    one taken before it was written. The column must be structurally valid.
    """
    state = xxhash.xxh3_64()
    _update_digest(state, column)
    return state.hexdigest()


def _update_digest(state: xxhash.xxh3_64, column: pa.Array) -> None:
    kind = column.type
    state.update(f"{kind}|{len(column)}|{column.null_count}".encode())
    if column.null_count:
        state.update(np.packbits(column.is_valid().to_numpy(zero_copy_only=False)).data)
        column = column.drop_null()
    if pa.types.is_fixed_size_list(kind):
        width = kind.list_size
        _update_digest(state, column.values.slice(column.offset * width, len(column) * width))
    elif pa.types.is_list(kind):
        offsets = _offsets(column)
        state.update(np.diff(offsets).data)
        _update_digest(state, column.values.slice(offsets[0], offsets[-1] - offsets[0]))
    elif pa.types.is_string(kind):
        offsets = _offsets(column)
        state.update(np.diff(offsets).data)
        state.update(memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    elif pa.types.is_boolean(kind):
        state.update(column.to_numpy(zero_copy_only=False).data)
    else:
        state.update(column.to_numpy(zero_copy_only=True).data)


def _offsets(column: pa.Array) -> npt.NDArray[np.int32]:
    """Where each value of a list or string column starts, and where the last one ends."""
    if len(column) == 0:
        return np.zeros(1, np.int32)
    offsets = np.frombuffer(column.buffers()[1], np.int32)
    return offsets[column.offset : column.offset + len(column) + 1]


# -- reading ---------------------------------------------------------------------------------------
class ArrowFile:
    """A verified reader of one Arrow IPC file; a context manager that closes its source.

    Args:
        source: The whole file, or a file with random access, of which only the footer and the
            columns asked for are fetched.
        name: What to call it in errors: store and path.
        schema: Exactly what the file must hold, metadata included.

    Raises:
        WrongMagicError: if the file is not an Arrow IPC file.
        ShardCorruptError: if it is not complete.
        WrongLabelSetError: if its schema is right but for the label set that it names.
        FormatError: if its schema differs otherwise.
    """

    num_batches: int
    """Record batches in the file."""

    def __init__(self, source: bytes | pa.NativeFile, *, name: str, schema: pa.Schema) -> None:
        self._file, self._name, self.schema = _PartialFile(source, name), name, schema
        self._projections: dict[tuple[str, ...], _Projection] = {}
        try:
            footer_start = self._file.fetch_footer()
            with _reading(name):
                self._blocks = _find_blocks(self._file, footer_start)
                found = self._file.open_reader().schema
            _check_schema(found, schema, name)
        except BaseException:
            self.close()
            raise
        self.num_batches = len(self._blocks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the source; batches that were read stay valid."""
        self._file.close()

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All verified batches as one table; see :meth:`batch`."""
        names = self.schema.names if columns is None else columns
        schema = pa.schema([self.schema.field(name) for name in names])
        return pa.Table.from_batches(list(self.batches(names)), schema=schema)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All batches in order, each verified before it is yielded; see :meth:`batch`."""
        for index in range(self.num_batches):
            yield self.batch(index, columns)

    def batch(self, index: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """One verified record batch.

        Args:
            index: Number of the batch in the file, from 0.
            columns: Names of the columns to read, at least one; all by default.

        Raises:
            KeyError, ValueError: if a column is not in the schema, or none is asked for.
            ShardCorruptError: naming file, batch and column.
            OversizedError: before anything is allocated, if the batch would take more than
                ``MAX_BATCH_BYTES`` or a column of fixed width more than its rows.
        """
        names = tuple(self.schema.names if columns is None else columns)
        if names not in self._projections:
            self._projections[names] = _Projection(self._file, self.schema, names)
        projection = self._projections[names]
        where = f"{self._name}: batch {index}"
        self._fetch(self._blocks[index], projection, where)
        with _reading(where):
            batch, metadata = projection.reader.get_batch_with_custom_metadata(index)
            batch.validate(full=True)  # offsets that leave their buffer would crash the process
            number = int(metadata[BATCH_FIELD])
            digests = metadata[CHECKSUM_FIELD].decode().split(" ")
            committed = dict(zip(self.schema.names, digests, strict=True))
        if number != index:
            raise ShardCorruptError(f"{where} is batch {number} of its file; {REMEDY}")
        batch = batch if columns is None else batch.select(names)
        for name, column in zip(names, batch.columns, strict=True):
            digest = column_digest(column)
            if digest != committed[name]:
                raise ShardCorruptError(
                    f"{where}: column {name!r} is damaged (checksum {digest}, committed "
                    f"{committed[name]}); {REMEDY}"
                )
        return batch

    def _fetch(self, block: Block, projection: "_Projection", where: str) -> None:
        """Bring the buffers of a batch into memory, compressed, and check what they will take."""
        file = self._file
        file.fetch(block.offset, block.stop if projection.is_all else block.body)
        with _reading(where):
            parts = projection.locate(read_layout(file.read(block.offset, block.body)), block)
        if not projection.is_all:
            file.fetch_parts(parts)
        total = 0
        for part in parts:
            size = file.size_in_memory(part)
            total += size
            if not 0 <= size <= part.limit:
                raise OversizedError(
                    f"{where}: column {part.column!r} claims to take {size} bytes, its values "
                    f"take at most {part.limit}; {REMEDY}"
                )
        if total > MAX_BATCH_BYTES:
            raise OversizedError(
                f"{where} would take {total} bytes in memory, a batch may take {MAX_BATCH_BYTES}; "
                f"{REMEDY}"
            )


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise ShardCorruptError(f"{where} is unreadable ({error}); {REMEDY}") from error


def _find_blocks(file: "_PartialFile", footer_start: int) -> list[Block]:
    """Where the batches lie; the file must hold nothing else between its schema and its footer."""
    (schema_bytes,) = struct.unpack("<I", file.read(HEAD_BYTES - 4, HEAD_BYTES))
    blocks = read_blocks(file.read(footer_start, file.size - TRAILER_BYTES))
    expected = HEAD_BYTES + schema_bytes
    for index, block in enumerate(blocks):
        if block.offset != expected or min(block.metadata_bytes, block.body_bytes) < 0:
            raise ValueError(f"batch {index} does not follow on what stands before it")
        expected = block.stop
    if expected + len(END_OF_BATCHES) != footer_start:
        raise ValueError("its last batch does not end at its footer")
    return blocks


def _check_schema(found: pa.Schema, wanted: pa.Schema, name: str) -> None:
    if found.equals(wanted, check_metadata=True):
        return
    label_sets = [(schema.metadata or {}).get(LABEL_SET_FIELD) for schema in (found, wanted)]
    if None not in label_sets:
        relabelled = found.with_metadata({**found.metadata, LABEL_SET_FIELD: label_sets[1]})
        if relabelled.equals(wanted, check_metadata=True):
            raise WrongLabelSetError(
                f"{name} belongs to label set {label_sets[0]!r}, not to {label_sets[1]!r}; {REMEDY}"
            )
    raise FormatError(
        f"{name} does not have the schema of its format and label set: wanted "
        f"{wanted.to_string()}, found {found.to_string()}; {REMEDY}"
    )


class _PartialFile:
    """A file in memory, of which only the parts that were fetched are there."""

    def __init__(self, source: bytes | pa.NativeFile, name: str) -> None:
        self._name = name
        self._source = None if isinstance(source, bytes) else source
        # memory that is not written to is never occupied
        self._bytes = (
            np.frombuffer(source, np.uint8)
            if isinstance(source, bytes)
            else np.zeros(source.size(), np.uint8)
        )
        self._view = self._bytes.data
        self.size = len(self._bytes)

    def close(self) -> None:
        """Close the source."""
        if self._source is not None:
            self._source.close()

    def fetch(self, start: int, stop: int) -> None:
        """Make the bytes from ``start`` to ``stop`` available."""
        if self._source is None or start == stop:
            return
        self._source.seek(start)
        if self._source.readinto(self._view[start:stop]) != stop - start:
            raise ShardCorruptError(f"{self._name} ends while it is read; {REMEDY}")

    def fetch_parts(self, parts: Iterable["_Part"]) -> None:
        """Fetch many parts, neighbours together."""
        runs: list[list[int]] = []
        for part in sorted(parts):
            if runs and part.start - runs[-1][1] < PADDING_BYTES:
                runs[-1][1] = max(part.stop, runs[-1][1])
            else:
                runs.append([part.start, part.stop])
        for start, stop in runs:
            self.fetch(start, stop)

    def fetch_footer(self) -> int:
        """Fetch first bytes and footer; where the footer starts.

        Raises:
            WrongMagicError, ShardCorruptError: if the file does not start or end as it should.
        """
        self.fetch(0, min(HEAD_BYTES, self.size))
        head = self.read(0, min(len(MAGIC), self.size))
        if head != MAGIC[: len(head)]:
            raise WrongMagicError(f"{self._name} is not an Arrow IPC file: it starts with {head!r}")
        tail_start = max(0, self.size - TAIL_BYTES)
        self.fetch(tail_start, self.size)
        trailer = self.read(max(0, self.size - TRAILER_BYTES), self.size)
        footer_bytes = int.from_bytes(trailer[: -len(MAGIC)], "little")
        footer_start = self.size - TRAILER_BYTES - footer_bytes
        if not trailer.endswith(MAGIC) or footer_start < HEAD_BYTES:
            raise ShardCorruptError(
                f"{self._name} is not a complete Arrow IPC file (it has no footer); {REMEDY}"
            )
        self.fetch(min(footer_start, tail_start), tail_start)
        return footer_start

    def read(self, start: int, stop: int) -> bytes:
        """Bytes that were fetched."""
        return self._bytes[start:stop].tobytes()

    def size_in_memory(self, part: "_Part") -> int:
        """Bytes that a buffer that was fetched takes once decompressed, as it claims."""
        (size,) = struct.unpack_from("<q", self._view, part.start)
        return part.stop - part.start - PREFIX_BYTES if size == STORED_RAW else int(size)

    def open_reader(self, fields: Sequence[int] = ()) -> pa.RecordBatchFileReader:
        """Arrow's reader of some fields, or of all."""
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=list(fields))
        return pa.ipc.open_file(pa.py_buffer(self._bytes), options=options)


class _Part(NamedTuple):
    """A buffer that holds something, and where it lies in its file."""

    start: int
    stop: int
    limit: int
    """Most bytes that it may take once decompressed."""
    column: str


class _Projection:
    """How to read some columns of any batch of a file."""

    def __init__(self, file: _PartialFile, schema: pa.Schema, names: Sequence[str]) -> None:
        """Raises ``KeyError`` if a name is not in the schema, ``ValueError`` if there is none."""
        if not names:
            raise ValueError("at least one column must be read, for Arrow none means all")
        fields = {schema.field(name).name for name in names}
        self.is_all = len(fields) == len(schema.names)
        self.reader = file.open_reader([schema.get_field_index(name) for name in fields])
        self._buffers = schema_buffers(schema)
        self._wanted = fields

    def locate(self, layout: BatchLayout, block: Block) -> list[_Part]:
        """The buffers of the columns in a batch.

        Raises:
            ValueError: if the batch has other buffers or one lies outside of it.
        """
        parts = []
        for kind, (offset, size) in zip(self._buffers, layout.buffers, strict=True):
            if kind.column not in self._wanted or size == 0:
                continue
            if offset < 0 or size < PREFIX_BYTES or offset + size > block.body_bytes:
                raise ValueError(f"a buffer of column {kind.column!r} is not where it should be")
            # one value more: offsets
            limit = (layout.lengths[kind.array] + 1) * kind.bits // 8 + PADDING_BYTES
            start = block.body + offset
            parts.append(
                _Part(start, start + size, limit if kind.bits else MAX_BATCH_BYTES, kind.column)
            )
        return parts
