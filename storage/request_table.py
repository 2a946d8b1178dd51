"""Many requests as columns: ten million of them fit into memory, as objects they do not."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.index import format_keys, parse_keys
from storage.partitions import Keys
from storage.request_columns import (
    REQUEST_SCHEMA,
    Held,
    Int64s,
    Ragged,
    Sources,
    keys_of_batch,
)
from storage.requests import SampleRequest, Source

BATCH_SAMPLES = 2**14
"""Samples of a record batch."""


class RequestTable(Sequence[SampleRequest]):
    """Requests in an order, each made when it is asked for.

    A table shares its columns with the one that it was taken from.

    Args:
        held: Batches of columns.
        all_keys: uint64[M, 2], keys of all samples of all batches.
        rows: int64[N], which of these M samples, None for all in order.
    """

    def __init__(self, held: Sequence[Held], all_keys: Keys, rows: Int64s | None = None) -> None:
        self._held, self._all_keys, self._rows = tuple(held), all_keys, rows
        sizes = [len(batch.index) for batch in held]
        self._first_rows: Int64s = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @classmethod
    def of(cls, requests: Sequence[SampleRequest]) -> "RequestTable":
        """A table of requests; their finish and stop reasons are left out."""
        if isinstance(requests, RequestTable):
            return requests
        builder = RequestTableBuilder()
        for request in requests:
            builder.add(
                request.prompt_ids_P,
                request.sample_index,
                response_ids=request.response_ids_R,
                label_mask=request.label_mask_R,
                sources=request.sources,
            )
        held = builder.held()
        digits = bytes.fromhex("".join(request.key for request in requests))
        keys = np.frombuffer(digits, dtype=">u8").reshape(-1, 2).astype(np.uint64)
        return cls(held, keys)

    # -- a sequence -------------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self._all_keys) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> SampleRequest: ...
    @overload
    def __getitem__(self, index: slice) -> list[SampleRequest]: ...
    def __getitem__(self, index: int | slice) -> SampleRequest | list[SampleRequest]:
        numbers = range(len(self))[index]
        if isinstance(numbers, int):
            return next(iter(self.requests([numbers])))
        return list(self.requests(numbers))

    def __iter__(self) -> Iterator[SampleRequest]:
        for start in range(0, len(self), BATCH_SAMPLES):
            yield from self.requests(range(start, min(start + BATCH_SAMPLES, len(self))))

    # -- samples ----------------------------------------------------------------------------------
    @property
    def key_array(self) -> Keys:
        """uint64[N, 2]: the sample keys."""
        return self._all_keys if self._rows is None else self._all_keys[self._rows]

    def keys(self, numbers: Sequence[int]) -> list[str]:
        """Sample keys of some requests."""
        return format_keys(self._all_keys[self._places(numbers)]) if len(numbers) else []

    def requests(self, numbers: Sequence[int], *, with_sources: bool = True) -> list[SampleRequest]:
        """Some of the requests, in the given order.

        Args:
            numbers: Which.
            with_sources: Whether they tell where they came from.
        """
        places = self._places(numbers)
        batches = np.searchsorted(self._first_rows, places, side="right") - 1
        rows = (places - self._first_rows[batches]).tolist()
        found = zip(self.keys(numbers), batches.tolist(), rows, strict=True)
        held = self._held
        return [
            SampleRequest(
                key=key,
                sample_index=int(held[batch].index[row]),
                prompt_ids_P=cast(npt.NDArray[np.int32], held[batch].prompts[row]),
                response_ids_R=_item(held[batch].responses, row),
                sources=held[batch].sources[row] if with_sources else (),
                label_mask_R=_item(held[batch].masks, row),
            )
            for key, batch, row in found
        ]

    def find(self, keys: Iterable[str]) -> Int64s:
        """int64[M], ascending: numbers of the requests that have one of these keys."""
        wanted = set(keys)
        heads = parse_keys(list(wanted))[:, 0]
        near = np.flatnonzero(np.isin(self.key_array[:, 0], heads))
        there = [key in wanted for key in self.keys(near.tolist())]
        return near[np.array(there, dtype=np.bool_)]

    def take(self, numbers: Int64s) -> "RequestTable":
        """Some of the requests as a table."""
        return RequestTable(self._held, self._all_keys, self._places(numbers))

    def _places(self, numbers: Sequence[int] | Int64s) -> Int64s:
        if isinstance(numbers, range):
            wanted = np.arange(numbers.start, numbers.stop, numbers.step)
        else:
            wanted = np.asarray(numbers, dtype=np.int64)
        return wanted if self._rows is None else self._rows[wanted]

    # -- columns ----------------------------------------------------------------------------------
    @cached_property
    def sample_index(self) -> Int64s:
        """int64[N]: number of the response to its prompt."""
        return self._column(lambda held: held.index)

    @cached_property
    def num_prompt_tokens(self) -> Int64s:
        """int64[N]."""
        return self._column(lambda held: held.prompts.lengths())

    @cached_property
    def num_response_tokens(self) -> Int64s:
        """int64[N]: of known responses, 0 where the teacher has to answer."""
        return self._column(lambda h: None if h.responses is None else h.responses.lengths())

    @cached_property
    def num_unlabelled_tokens(self) -> Int64s:
        """int64[N]: response tokens that the label mask leaves out."""
        return self._column(lambda h: None if h.masks is None else h.masks.num_false())

    @cached_property
    def num_sources(self) -> Int64s:
        """int64[N]: rows that asked for a sample."""
        return self._column(lambda held: np.diff(held.sources.first_S))

    def _column(self, read: Callable[[Held], npt.NDArray[np.integer] | None]) -> Int64s:
        whole = np.zeros(len(self._all_keys), dtype=np.int64)
        for start, held in zip(self._first_rows.tolist(), self._held, strict=False):
            found = read(held)
            if found is not None:
                whole[start : start + len(held.index)] = found
        return whole if self._rows is None else whole[self._rows]

    # -- storing ----------------------------------------------------------------------------------
    def batches(self) -> Iterator[tuple[Keys, pa.RecordBatch]]:
        """Keys and columns, ``BATCH_SAMPLES`` at a time."""
        if self._rows is None:
            for (start, stop), held in zip(pairwise(self._first_rows), self._held, strict=True):
                yield self._all_keys[start:stop], held.batch()
            return
        for start in range(0, len(self), BATCH_SAMPLES):
            part = RequestTableBuilder()
            numbers = range(start, min(start + BATCH_SAMPLES, len(self)))
            for r in self.requests(numbers):
                part.add(
                    r.prompt_ids_P,
                    r.sample_index,
                    response_ids=r.response_ids_R,
                    label_mask=r.label_mask_R,
                    sources=r.sources,
                )
            (held,) = part.held()
            yield self._all_keys[self._places(numbers)], held.batch()


class RequestTableBuilder:
    """Collects requests; ten million of them never exist as objects at the same time."""

    def __init__(self) -> None:
        self._held: list[Held] = []
        self._keys: list[Keys] = [np.zeros((0, 2), np.uint64)]
        self._clear()

    def _clear(self) -> None:
        self._index: list[int] = []
        self._prompts, self._responses, self._masks = _Lists(), _Lists(), _Lists()
        self._files, self._lines, self._ids = _Lists(), _Lists(), _Lists()

    def add(
        self,
        prompt_ids: Iterable[int],
        sample_index: int,
        *,
        response_ids: Iterable[int] | None,
        label_mask: Iterable[bool] | None,
        sources: Sequence[Source],
    ) -> None:
        """One more request; see :class:`SampleRequest`."""
        self._index.append(sample_index)
        self._prompts.add(prompt_ids)
        self._responses.add(response_ids)
        self._masks.add(label_mask)
        self._files.add([source.file for source in sources])
        self._lines.add([source.line for source in sources])
        self._ids.add([source.id for source in sources])
        if len(self._index) == BATCH_SAMPLES:
            self._close()

    def _close(self) -> None:
        lists = zip(
            (self._prompts, self._responses, self._masks, self._files, self._lines, self._ids),
            REQUEST_SCHEMA.types[1:],
            strict=True,
        )
        columns = [pa.array(self._index, pa.int32()), *(own.array(of) for own, of in lists)]
        batch = pa.RecordBatch.from_arrays(columns, schema=REQUEST_SCHEMA)
        self._held.append(Held.of(batch))
        self._keys.append(keys_of_batch(batch))
        self._clear()

    def held(self) -> list[Held]:
        """The batches of columns of all requests."""
        if self._index:
            self._close()
        return self._held

    def table(self) -> RequestTable:
        """The requests, in order, each with the key of its tokens."""
        held = self.held()
        return RequestTable(held, np.concatenate(self._keys))


class _Lists:
    """Lists of one column, end to end."""

    def __init__(self) -> None:
        self._values: list[object] = []
        self._ends: list[int | None] = [0]
        self._missing: list[bool] = []

    def add(self, values: Iterable[object] | None) -> None:
        if values is not None:
            self._values.extend(values)
        self._missing.append(values is None)
        self._ends.append(len(self._values))

    def array(self, of: pa.DataType) -> pa.ListArray:
        values: object = self._values
        if pa.types.is_int32(of.value_type):
            values = np.array(self._values, dtype=np.int32)
        missing = pa.array(self._missing) if any(self._missing) else None
        ends = pa.array(self._ends, pa.int32())
        return pa.ListArray.from_arrays(ends, pa.array(values, of.value_type), mask=missing)


def unique_requests(tables: Sequence[RequestTable]) -> RequestTable:
    """The requests of all tables in order, of each sample the first one."""
    held = [batch for table in tables for batch in table._held]
    keys = np.concatenate([np.zeros((0, 2), np.uint64), *(table._all_keys for table in tables)])
    offsets = np.cumsum([0, *(len(table._all_keys) for table in tables)])
    places = [
        table._places(range(len(table))) + offset
        for table, offset in zip(tables, offsets, strict=False)
    ]
    rows = np.concatenate([np.zeros(0, np.int64), *places])
    first = first_occurrences(keys[rows])
    rows = rows[first]
    whole = len(rows) == len(keys) and bool((rows == np.arange(len(rows))).all())
    return RequestTable(held, keys, None if whole else rows)


def merged_requests(table: RequestTable) -> RequestTable:
    """Equal requests as one with all their sources, in the order of their first."""
    keys, held = table._all_keys, table._held
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    fresh = _differs_from_before(keys[order])
    if fresh.all():
        return table
    first_of = np.empty(len(keys), dtype=np.int64)
    first_of[order] = order[fresh][np.cumsum(fresh) - 1]
    first = np.flatnonzero(first_of == np.arange(len(keys)))
    # sources of every request follow those of its first, in the order in which they were read
    owners = np.repeat(first_of, table.num_sources)
    by_owner = pa.array(np.argsort(owners, kind="stable"))
    files = pa.chunked_array([h.sources.files for h in held]).unify_dictionaries()
    lines = pa.chunked_array([h.sources.lines for h in held])
    ids = pa.chunked_array([h.sources.ids for h in held])
    columns = [column.combine_chunks().take(by_owner) for column in (files, lines, ids)]
    ends = np.cumsum(np.bincount(owners, minlength=len(keys))[first])
    begins = np.concatenate([[0], ends])
    merged = []
    for start, batch in zip(table._first_rows.tolist(), held, strict=False):
        low, high = np.searchsorted(first, [start, start + len(batch.index)]).tolist()
        if low == high:
            continue
        rows = first[low:high] - start
        prompts = batch.prompts.take(rows)
        assert prompts is not None
        places = slice(int(begins[low]), int(begins[high]))
        merged.append(
            Held(
                batch.index[rows],
                prompts,
                None if batch.responses is None else batch.responses.take(rows),
                None if batch.masks is None else batch.masks.take(rows),
                Sources(begins[low : high + 1] - begins[low], *(c[places] for c in columns)),
            )
        )
    return RequestTable(merged, keys[first])


def _differs_from_before(ordered: Keys) -> npt.NDArray[np.bool_]:
    fresh = np.ones(len(ordered), dtype=np.bool_)
    fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return fresh


def first_occurrences(keys: Keys) -> Int64s:
    """int64[M], ascending: the places where a key stands for the first time."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    return np.sort(order[_differs_from_before(keys[order])])


def _item(lists: Ragged | None, row: int) -> Any:
    return None if lists is None else lists[row]
