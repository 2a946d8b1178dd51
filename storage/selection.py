"""Selections: the immutable, ordered lists of samples that a request resolved to.

Runs, evaluation and filters read selections, never a whole label set, so labels that appear later
cannot change an experiment. A selection holds the token ids of its prompts, so labelling,
training and inspection need neither the prompt files nor a tokenizer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.errors import FormatError, LabelStoreError
from storage.ipc import ArrowFile, encode_file
from storage.keys import key_of, sample_key
from storage.objects import Objects
from storage.schema import FORMAT_VERSION

BATCH_SAMPLES = 2**14
"""Samples of a record batch."""

SELECTION_SCHEMA = pa.schema(
    [
        pa.field("sample_key", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32())),
        pa.field("label_mask", pa.list_(pa.bool_())),
        pa.field("source_file", pa.list_(pa.string()), nullable=False),
        pa.field("source_line", pa.list_(pa.int32()), nullable=False),
        pa.field("source_id", pa.list_(pa.string()), nullable=False),
    ],
    metadata={"distillcache.format": str(FORMAT_VERSION), "distillcache.table": "selection"},
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a prompt was read."""

    file: str
    line: int
    """1-based line of a JSONL file, 0-based row of a Parquet file or dataset plus one."""
    id: str


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One sample to be labelled, or looked up."""

    key: str
    sample_index: int
    prompt_ids_P: npt.NDArray[np.int32]
    """int32[P]: tokens given to the teacher."""
    response_ids_R: npt.NDArray[np.int32] | None
    """int32[R]: the known response, None where the teacher has to answer. Known are those of score
    mode, and stored answers that are scored again for more labels."""
    sources: tuple[Source, ...]
    """Every row that asked for this sample; equal prompts are one sample with several sources."""
    label_mask_R: npt.NDArray[np.bool_] | None = None
    """bool[R]: which tokens of a given response are labelled, None for all."""
    finish_reason: str = "given"
    """How a known response ended: that of its sample where the teacher's own, stored answer is
    scored again. Part of neither the key nor a stored selection."""
    stop_reason: str | None = None
    """The stop string that ended a known response, if one did; stored as little."""

    @property
    def is_genuine(self) -> bool:
        """Whether the key is that of the tokens."""
        return self.key == sample_key(
            self.prompt_ids_P,
            self.sample_index,
            response_ids=self.response_ids_R,
            label_mask=self.label_mask_R,
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """An ordered list of distinct samples."""

    requests: tuple[SampleRequest, ...]

    @property
    def key(self) -> str:
        """Digest of the content: samples in order, with their sources."""
        return key_of([_identity(request) for request in self.requests])

    @property
    def sample_keys(self) -> list[str]:
        """The sample keys, in order."""
        return [request.key for request in self.requests]

    def save(self, objects: Objects) -> str:
        """Store under its key and return the key; storing it again changes nothing."""
        rows = [_row(request) for request in self.requests]
        batches = [
            pa.RecordBatch.from_pylist(rows[start : start + BATCH_SAMPLES], schema=SELECTION_SCHEMA)
            for start in range(0, len(rows), BATCH_SAMPLES)
        ]
        data = encode_file(batches, SELECTION_SCHEMA)
        objects.create(f"selections/{self.key}.arrow", data)
        return self.key


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
    return Selection(tuple(_verified(objects, key)))


def load_selection_index(objects: Objects, key: str) -> SelectionIndex:
    """Load and verify a selection without holding its prompts; raises as :func:`load_selection`."""
    keys: list[str] = []
    prompts: list[int] = []
    last_rows: list[int] = []
    for request in _verified(objects, key):
        keys.append(request.key)
        prompts.append(len(request.prompt_ids_P))
        mask = request.label_mask_R
        last_rows.append(-1 if mask is None else _last_run(mask))
    return SelectionIndex(tuple(keys), np.array(prompts, np.int64), np.array(last_rows, np.int64))


def _last_run(mask_R: npt.NDArray[np.bool_]) -> int:
    """Length of the last run of True."""
    labelled = np.flatnonzero(mask_R)
    gaps = np.flatnonzero(np.diff(labelled) > 1)
    return len(labelled) - (int(gaps[-1]) + 1 if len(gaps) else 0)


def _verified(objects: Objects, key: str) -> Iterator[SampleRequest]:
    """The requests of a stored selection, batch by batch; the last one ends the verification."""
    path = f"selections/{key}.arrow"
    name = f"{objects.uri}/{path}"
    try:
        data = objects.get(path)
    except FileNotFoundError as error:
        raise LabelStoreError(f"selection {key} is not in store {objects.uri!r}") from error
    identities = []
    with ArrowFile(data, name=name, schema=SELECTION_SCHEMA) as file:
        for batch in file.batches():
            try:
                requests = [_request(row) for row in _rows(batch)]
            except ValueError as error:  # lists of sources of unequal lengths
                raise FormatError(f"{name} is damaged: {error}") from error
            identities += [_identity(request) for request in requests]
            if not all(request.is_genuine for request in requests):
                raise FormatError(f"{name}: its content does not have the key {key}")
            yield from requests
    if key_of(identities) != key:
        raise FormatError(f"{name}: its content does not have the key {key}")


def _identity(request: SampleRequest) -> list[object]:
    """What of a request the key of a selection covers."""
    sources = [[source.file, source.line, source.id] for source in request.sources]
    return [request.key, request.sample_index, sources]


def _rows(batch: pa.RecordBatch) -> Iterable[dict[str, object]]:
    """Rows as dictionaries; lists of tokens stay arrays, as objects they would take ten times."""
    columns = {
        name: (_arrays if name in _TOKEN_COLUMNS else pa.Array.to_pylist)(batch.column(name))
        for name in batch.schema.names
    }
    return ({name: values[row] for name, values in columns.items()} for row in range(len(batch)))


_TOKEN_COLUMNS = ("prompt_ids", "response_ids", "label_mask")


def _arrays(column: pa.Array) -> list[npt.NDArray[np.generic] | None]:
    """The lists of a column as arrays of their own, None for null."""
    offsets = column.offsets.to_numpy().tolist()
    items = column.values.to_numpy(zero_copy_only=False)
    valid = column.is_valid().to_pylist()
    spans = zip(offsets[:-1], offsets[1:], valid, strict=True)
    return [items[start:stop].copy() if there else None for start, stop, there in spans]


def _row(request: SampleRequest) -> dict[str, object]:
    return {
        "sample_key": request.key,
        "sample_index": request.sample_index,
        "prompt_ids": request.prompt_ids_P,
        "response_ids": request.response_ids_R,
        "label_mask": request.label_mask_R,
        "source_file": [source.file for source in request.sources],
        "source_line": [source.line for source in request.sources],
        "source_id": [source.id for source in request.sources],
    }


def _request(row: dict[str, object]) -> SampleRequest:
    response, mask = row["response_ids"], row["label_mask"]
    sources = zip(
        row["source_file"],  # type: ignore[call-overload]  # checked against the schema
        row["source_line"],
        row["source_id"],
        strict=True,
    )
    return SampleRequest(
        key=str(row["sample_key"]),
        sample_index=int(row["sample_index"]),  # type: ignore[call-overload]  # int32 column
        prompt_ids_P=np.array(row["prompt_ids"], dtype=np.int32),
        response_ids_R=None if response is None else np.array(response, dtype=np.int32),
        sources=tuple(Source(*source) for source in sources),
        label_mask_R=None if mask is None else np.array(mask, dtype=np.bool_),
    )
