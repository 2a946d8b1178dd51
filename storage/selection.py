"""Selections: the immutable, ordered lists of samples that a request resolved to.

Runs, evaluation and filters read selections, never a whole label set, so labels that appear later
cannot change an experiment. A selection holds the token ids of its prompts, so labelling,
training and inspection need neither the prompt files nor a tokenizer.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.errors import FormatError, LabelStoreError
from storage.index import format_keys, parse_keys
from storage.ipc import ArrowFile, encode_file
from storage.keys import KEY_HEX_DIGITS
from storage.objects import Objects
from storage.partitions import Keys
from storage.request_columns import REQUEST_SCHEMA, Held, identities, keys_of_batch
from storage.request_table import RequestTable
from storage.requests import SampleRequest, Source
from storage.schema import FORMAT_VERSION

__all__ = [
    "SELECTION_SCHEMA",
    "SampleRequest",
    "Selection",
    "SelectionIndex",
    "Source",
    "load_selection",
    "load_selection_index",
]

SELECTION_SCHEMA = pa.schema(
    [pa.field("sample_key", pa.string(), nullable=False), *REQUEST_SCHEMA],
    metadata={"distillcache.format": str(FORMAT_VERSION), "distillcache.table": "selection"},
)


@dataclass(frozen=True, slots=True)
class Selection:
    """An ordered list of distinct samples."""

    requests: Sequence[SampleRequest]

    @property
    def table(self) -> RequestTable:
        """The samples as columns."""
        return RequestTable.of(self.requests)

    @property
    def key(self) -> str:
        """Digest of the content: samples in order, with their sources."""
        digest = _KeyOfBatches()
        for keys, batch in self.table.batches():
            digest.add(keys, batch)
        return digest.key

    @property
    def sample_keys(self) -> list[str]:
        """The sample keys, in order."""
        return format_keys(self.table.key_array)

    def save(self, objects: Objects) -> str:
        """Store under its key and return the key; storing it again changes nothing."""
        digest = _KeyOfBatches()

        def batches() -> Iterator[pa.RecordBatch]:
            for keys, batch in self.table.batches():
                digest.add(keys, batch)
                names = pa.array(format_keys(keys))
                yield pa.RecordBatch.from_arrays([names, *batch.columns], schema=SELECTION_SCHEMA)

        data = encode_file(batches(), SELECTION_SCHEMA)
        objects.create(f"selections/{digest.key}.arrow", data)
        return digest.key


class _KeyOfBatches:
    """The key of a selection, batch by batch.

    It is ``key_of`` of the list of what the key covers of every request.
    """

    def __init__(self) -> None:
        self._state = hashlib.sha256(b"[")
        self._is_first = True

    def add(self, keys: Keys, batch: pa.RecordBatch) -> None:
        """The next requests."""
        text = identities(keys, batch)
        if text:
            self._state.update((text if self._is_first else f",{text}").encode())
            self._is_first = False

    @property
    def key(self) -> str:
        """Of all requests so far."""
        state = self._state.copy()
        state.update(b"]")
        return state.hexdigest()[:KEY_HEX_DIGITS]


@dataclass(frozen=True, slots=True)
class SelectionIndex:
    """What a training needs to know of the S samples of a selection; their tokens are left out."""

    sample_keys: tuple[str, ...]
    """In the order of the selection."""
    num_prompt_tokens_S: npt.NDArray[np.int64]
    """int64[S]: tokens of every prompt."""
    num_last_rows_S: npt.NDArray[np.int64]
    """int64[S]: labelled tokens after the last gap of the label mask; -1 where nothing masks."""


def load_selection(objects: Objects, key: str) -> Selection:
    """Load and verify a selection.

    Raises:
        LabelStoreError: if it is not stored.
        ShardCorruptError: if it is damaged.
        FormatError: if its content does not have the key, or a sample's tokens not theirs.
    """
    held, keys = [], [np.zeros((0, 2), np.uint64)]
    for batch_keys, batch in _verified(objects, key):
        held.append(Held.of(batch))
        keys.append(batch_keys)
    return Selection(RequestTable(held, np.concatenate(keys)))


def load_selection_index(objects: Objects, key: str) -> SelectionIndex:
    """Load and verify a selection without holding its prompts; raises as :func:`load_selection`."""
    keys: list[str] = []
    prompts: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    last_rows: list[int] = []
    for batch_keys, batch in _verified(objects, key):
        table = RequestTable([Held.of(batch)], batch_keys)
        keys += format_keys(batch_keys)
        prompts.append(table.num_prompt_tokens)
        if batch.column("label_mask").null_count == len(batch):
            last_rows += [-1] * len(batch)
            continue
        masks = (request.label_mask_R for request in table)
        last_rows += [-1 if mask is None else _last_run(mask) for mask in masks]
    return SelectionIndex(tuple(keys), np.concatenate(prompts), np.array(last_rows, np.int64))


def _last_run(mask_R: npt.NDArray[np.bool_]) -> int:
    """Length of the last run of True."""
    labelled = np.flatnonzero(mask_R)
    gaps = np.flatnonzero(np.diff(labelled) > 1)
    return len(labelled) - (int(gaps[-1]) + 1 if len(gaps) else 0)


def _verified(objects: Objects, key: str) -> Iterator[tuple[Keys, pa.RecordBatch]]:
    """Keys and columns of a stored selection, batch by batch; it is verified with the last one."""
    path = f"selections/{key}.arrow"
    name = f"{objects.uri}/{path}"
    try:
        data = objects.get(path)
    except FileNotFoundError as error:
        raise LabelStoreError(f"selection {key} is not in store {objects.uri!r}") from error
    wrong = f"{name}: its content does not have the key {key}"
    digest = _KeyOfBatches()
    with ArrowFile(data, name=name, schema=SELECTION_SCHEMA) as file:
        for stored in file.batches():
            columns = pa.RecordBatch.from_arrays(stored.columns[1:], schema=REQUEST_SCHEMA)
            try:
                keys = parse_keys(stored.column(0).to_pylist())
                genuine = keys_of_batch(columns)
                digest.add(keys, columns)
            except ValueError as error:  # lists of unequal lengths, or a key that is none
                raise FormatError(f"{name} is damaged: {error}") from error
            if not np.array_equal(keys, genuine):
                raise FormatError(wrong)
            yield keys, columns
    if digest.key != key:
        raise FormatError(wrong)
