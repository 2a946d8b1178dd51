"""Selections: the immutable, ordered lists of samples that a request resolved to.

Runs, evaluation and filters read selections, never a whole label set, so labels that appear later
cannot change an experiment. A selection holds the token ids of its prompts, so labelling,
training and inspection need neither the prompt files nor a tokenizer.
"""

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
        return key_of(
            [
                [r.key, r.sample_index, [[s.file, s.line, s.id] for s in r.sources]]
                for r in self.requests
            ]
        )

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


def load_selection(objects: Objects, key: str) -> Selection:
    """Load and verify a selection.

    Raises:
        LabelStoreError: if it is not stored.
        ShardCorruptError: if it is damaged.
        FormatError: if its content does not have the key, or a sample's tokens not theirs.
    """
    path = f"selections/{key}.arrow"
    name = f"{objects.uri}/{path}"
    try:
        data = objects.get(path)
    except FileNotFoundError as error:
        raise LabelStoreError(f"selection {key} is not in store {objects.uri!r}") from error
    with ArrowFile(data, name=name, schema=SELECTION_SCHEMA) as file:
        rows = file.table().to_pylist()
    try:
        selection = Selection(tuple(_request(row) for row in rows))
    except ValueError as error:  # lists of sources of unequal lengths
        raise FormatError(f"{name} is damaged: {error}") from error
    if selection.key != key or not all(request.is_genuine for request in selection.requests):
        raise FormatError(f"{name}: its content does not have the key {key}")
    return selection


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
