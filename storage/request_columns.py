"""Columns of requests, as they are stored and as they are kept in memory.

Memory holds what a selection stores, except for two things that would take most of it and that the
rest tells: names of files are there once, and ids that are ``FILE:LINE`` not at all.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from storage.index import format_keys
from storage.keys import sample_keys
from storage.partitions import Keys
from storage.requests import Source

Int64s = npt.NDArray[np.int64]

SOURCE_COLUMNS = ("source_file", "source_line", "source_id")
REQUEST_SCHEMA = pa.schema(
    [
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32())),
        pa.field("label_mask", pa.list_(pa.bool_())),
        pa.field("source_file", pa.list_(pa.string()), nullable=False),
        pa.field("source_line", pa.list_(pa.int32()), nullable=False),
        pa.field("source_id", pa.list_(pa.string()), nullable=False),
    ]
)
"""What of a request is stored beside its key."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """S lists of numbers end to end, some of them missing."""

    offsets: npt.NDArray[np.int32]
    """int32[S + 1]."""
    values: npt.NDArray[np.int32] | npt.NDArray[np.bool_]
    valid: npt.NDArray[np.bool_] | None
    """bool[S]: which lists are there, None for all."""

    @classmethod
    def of(cls, column: pa.ListArray) -> "Ragged | None":
        """The lists of a column, None if all are missing."""
        if len(column) and column.null_count == len(column):
            return None
        valid = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else None
        values = column.values.to_numpy(zero_copy_only=False)
        return cls(column.offsets.to_numpy(), values, valid)

    def __getitem__(self, row: int) -> npt.NDArray[np.generic] | None:
        if self.valid is not None and not self.valid[row]:
            return None
        # a copy: a request may live longer than its table
        return self.values[self.offsets[row] : self.offsets[row + 1]].copy()

    def column(self) -> pa.ListArray:
        """As it came."""
        missing = None if self.valid is None else pa.array(~self.valid)
        values = pa.array(self.values)
        return pa.ListArray.from_arrays(pa.array(self.offsets), values, mask=missing)

    def take(self, rows: Int64s) -> "Ragged | None":
        """Some of the lists, None if all of these are missing."""
        return Ragged.of(self.column().take(pa.array(rows)))

    def lengths(self) -> Int64s:
        """int64[S]: 0 for what is missing."""
        return np.diff(self.offsets).astype(np.int64)

    def num_false(self) -> Int64s:
        """int64[S]: how many values are False."""
        before = np.concatenate([[0], np.cumsum(~self.values.astype(np.bool_))])
        return np.asarray(before[self.offsets[1:]] - before[self.offsets[:-1]], dtype=np.int64)

    def as_bytes(self) -> Iterator[memoryview | None]:
        """Every list as little-endian 64-bit integers."""
        data = memoryview(self.values.astype("<i8").tobytes())
        valid = [True] * (len(self.offsets) - 1) if self.valid is None else self.valid.tolist()
        for (start, stop), there in zip(
            pairwise((8 * self.offsets.astype(np.int64)).tolist()), valid, strict=True
        ):
            yield data[start:stop] if there else None


@dataclass(frozen=True, slots=True)
class Sources:
    """Where S samples came from."""

    first_S: Int64s
    """int64[S + 1]: where the sources of every sample begin, and the end."""
    files: pa.DictionaryArray
    lines: pa.Array
    """int32."""
    ids: pa.Array
    """string: None where it is ``FILE:LINE``."""

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "Sources":
        """Those of a batch of ``REQUEST_SCHEMA``.

        Raises:
            ValueError: if its lists of sources have unequal lengths.
        """
        lists = [batch.column(name) for name in SOURCE_COLUMNS]
        first = [column.offsets.to_numpy().astype(np.int64) for column in lists]
        first = [offsets - offsets[0] for offsets in first]
        if not all(np.array_equal(first[0], other) for other in first[1:]):
            raise ValueError("its lists of sources have unequal lengths")
        files, lines, ids = (column.flatten() for column in lists)
        told = pc.equal(ids, _default_ids(files, lines))
        ids = pc.if_else(told, pa.scalar(None, pa.string()), ids)
        return cls(first[0], files.dictionary_encode(), lines, ids)

    def columns(self) -> list[pa.ListArray]:
        """The three columns as they came."""
        files = self.files.dictionary_decode()
        ids = pc.coalesce(self.ids, _default_ids(files, self.lines))
        offsets = pa.array(self.first_S.astype(np.int32))
        return [pa.ListArray.from_arrays(offsets, values) for values in (files, self.lines, ids)]

    def __getitem__(self, row: int) -> tuple[Source, ...]:
        found = []
        for place in range(int(self.first_S[row]), int(self.first_S[row + 1])):
            file, line = self.files[place].as_py(), self.lines[place].as_py()
            name = self.ids[place].as_py()
            found.append(Source(file, line, f"{file}:{line}" if name is None else name))
        return tuple(found)


def _default_ids(files: pa.Array, lines: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(files, pc.cast(lines, pa.string()), ":")


@dataclass(frozen=True, slots=True)
class Held:
    """A batch of S requests as a table keeps it."""

    index: npt.NDArray[np.int32]
    prompts: Ragged
    responses: Ragged | None
    masks: Ragged | None
    sources: Sources

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "Held":
        """A batch of ``REQUEST_SCHEMA``.

        Raises:
            ValueError: if its lists of sources have unequal lengths.
        """
        lists = (batch.column(name) for name in ("prompt_ids", "response_ids", "label_mask"))
        prompts, responses, masks = map(Ragged.of, lists)
        assert prompts is not None
        index = batch.column("sample_index").to_numpy()
        return cls(index, prompts, responses, masks, Sources.of(batch))

    def batch(self) -> pa.RecordBatch:
        """The columns of ``REQUEST_SCHEMA``."""
        given = [
            pa.nulls(len(self.index), of) if lists is None else lists.column()
            for lists, of in (
                (self.responses, pa.list_(pa.int32())),
                (self.masks, pa.list_(pa.bool_())),
            )
        ]
        arrays = [pa.array(self.index), self.prompts.column(), *given, *self.sources.columns()]
        return pa.RecordBatch.from_arrays(arrays, schema=REQUEST_SCHEMA)


def keys_of_batch(batch: pa.RecordBatch) -> Keys:
    """uint64[N, 2]: the keys of the tokens of a batch of ``REQUEST_SCHEMA``.

    Raises:
        ValueError: if a mask has not the length of its response.
    """
    lists = (batch.column(name) for name in ("prompt_ids", "response_ids", "label_mask"))
    prompts, responses, masks = map(Ragged.of, lists)
    assert prompts is not None
    given: list[Sequence[memoryview]] = [()] * len(batch)
    if responses is not None:
        all_masks = [None] * len(batch) if masks is None else masks.as_bytes()
        given = [
            () if ids is None else (ids, _all_labelled(ids) if mask is None else mask)
            for ids, mask in zip(responses.as_bytes(), all_masks, strict=True)
        ]
    prompt_bytes = [ids if ids is not None else memoryview(b"") for ids in prompts.as_bytes()]
    return sample_keys(prompt_bytes, batch.column("sample_index").to_pylist(), given)


def _all_labelled(ids: memoryview) -> memoryview:
    return memoryview(np.ones(ids.nbytes // 8, dtype="<i8").tobytes())


def identities(keys: Keys, batch: pa.RecordBatch) -> str:
    """What of requests the key of a selection covers, as in canonical JSON, without brackets.

    Raises:
        ValueError: if the lists of sources of a request have unequal lengths.
    """
    lists = [batch.column(name) for name in SOURCE_COLUMNS]
    offsets = [column.offsets.to_pylist() for column in lists]
    if len({tuple(places) for places in offsets}) > 1:
        raise ValueError("its lists of sources have unequal lengths")
    sources = list(zip(*(column.values.to_pylist() for column in lists), strict=True))
    numbers = batch.column("sample_index").to_pylist()
    rows = [
        (key, number, sources[start:stop])
        for key, number, (start, stop) in zip(
            format_keys(keys), numbers, pairwise(offsets[0]), strict=True
        )
    ]
    return json.dumps(rows, separators=(",", ":"), ensure_ascii=True)[1:-1]
