"""Selections: the immutable, ordered lists of samples that a request resolved to.

Runs, evaluation and filters read selections, never a whole label set, so labels that appear later
cannot change an experiment. A selection holds the token ids of its prompts, so labelling,
training and inspection need neither the prompt files nor a tokenizer.
"""

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.errors import FormatError, LabelStoreError
from storage.keys import key_of, sample_key
from storage.objects import Objects

SELECTION_SCHEMA = pa.schema(
    [
        pa.field("sample_key", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32())),
        pa.field("source_file", pa.list_(pa.string()), nullable=False),
        pa.field("source_line", pa.list_(pa.int32()), nullable=False),
        pa.field("source_id", pa.list_(pa.string()), nullable=False),
    ]
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
    """int32[R]: the given response in score mode, None where the teacher answers."""
    sources: tuple[Source, ...]
    """Every row that asked for this sample; equal prompts are one sample with several sources."""


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
        rows = [
            {
                "sample_key": r.key,
                "sample_index": r.sample_index,
                "prompt_ids": r.prompt_ids_P,
                "response_ids": r.response_ids_R,
                "source_file": [s.file for s in r.sources],
                "source_line": [s.line for s in r.sources],
                "source_id": [s.id for s in r.sources],
            }
            for r in self.requests
        ]
        sink = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1))
        with pa.ipc.new_file(sink, SELECTION_SCHEMA, options=options) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SELECTION_SCHEMA))
        objects.create(f"selections/{self.key}.arrow", sink.getvalue())
        return self.key


def load_selection(objects: Objects, key: str) -> Selection:
    """Load and verify a selection.

    Raises:
        LabelStoreError: if it is not stored.
        FormatError: if its content does not have the key, or a sample's tokens not theirs.
    """
    path = f"selections/{key}.arrow"
    try:
        data = objects.get(path)
    except FileNotFoundError as error:
        raise LabelStoreError(f"selection {key} is not in store {objects.uri!r}") from error
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        if not table.schema.equals(SELECTION_SCHEMA):
            raise FormatError(f"{objects.uri}/{path} does not have the schema of a selection")
        table.validate(full=True)  # offsets that leave their buffer would crash the process
        selection = Selection(tuple(_request(row) for row in table.to_pylist()))
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise FormatError(f"{objects.uri}/{path} is damaged: {error}") from error
    tampered = [
        r.key
        for r in selection.requests
        if r.key != sample_key(r.prompt_ids_P, r.sample_index, response_ids=r.response_ids_R)
    ]
    if selection.key != key or tampered:
        raise FormatError(f"{objects.uri}/{path}: its content does not have the key {key}")
    return selection


def _request(row: dict[str, object]) -> SampleRequest:
    response = row["response_ids"]
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
    )
