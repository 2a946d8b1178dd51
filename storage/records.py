"""The JSON documents of a label set: its spec and its numbered commit records.

A commit record is the only thing that makes a shard exist. Records are created with
put-if-absent under consecutive numbers, so any number of writers agree on one history. Every
document carries a checksum of its content.
"""

import re
from typing import Annotated, ClassVar, Literal, TypeVar

import xxhash
from pydantic import AfterValidator, Field, ValidationError, model_validator

from storage.config import Config
from storage.errors import (
    EditedSpecError,
    FormatError,
    LabelStoreError,
    ShardCorruptError,
    UnsafePathError,
)
from storage.keys import LabelSetSpec
from storage.schema import FORMAT_VERSION

_SAFE_NAME = re.compile(r"[0-9a-z][0-9a-z-]*")

CHECKSUM_MEMBER = b'"checksum": "'
NO_CHECKSUM = "0" * 32
"""What stands in a document while its checksum is computed."""


def _safe_name(name: str) -> str:
    """A name inside the label set's own folder: no separators, no parent.

    Raises:
        UnsafePathError: if it could lead anywhere else.
    """
    if not _SAFE_NAME.fullmatch(name):
        raise UnsafePathError(
            f"{name!r} is not a plain name of {_SAFE_NAME.pattern}; it might lead out of the store"
        )
    return name


Name = Annotated[str, AfterValidator(_safe_name)]
"""Files are found by such names only; a record holds no path."""

Partition = Annotated[str, Field(pattern="^[01]{0,16}$")]
"""Leading bits, as text, that all sample keys of a shard share."""


SampleKey = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class FileRecord(Config):
    """One immutable file."""

    num_bytes: int = Field(ge=0)
    xxh3_128: str
    """Checksum of the whole file."""

    @classmethod
    def of(cls, data: bytes) -> "FileRecord":
        """What a record says of a file with this content."""
        return cls(num_bytes=len(data), xxh3_128=xxhash.xxh3_128_hexdigest(data))

    def require(self, data: bytes, *, name: str) -> None:
        """Raises ShardCorruptError unless the file has this content."""
        found = FileRecord.of(data)
        if found != self:
            raise ShardCorruptError(
                f"{name} has {found.num_bytes} bytes and the checksum {found.xxh3_128}; committed "
                f"were {self.num_bytes} bytes and {self.xxh3_128}: run `distill repair`"
            )


class Document(Config):
    """A JSON file of the store; it carries a checksum of its content."""

    damage: ClassVar[type[LabelStoreError]]
    """What is raised when the checksum does not fit."""

    checksum: str = NO_CHECKSUM
    """XXH3-128 of the file, computed with NO_CHECKSUM in this place."""


class ShardRecord(Config):
    """One shard of a commit."""

    name: Name
    partition: Partition
    labels: FileRecord
    samples: FileRecord
    batch_rows: tuple[int, ...]
    """Rows of every record batch of the labels file."""
    num_samples: int = Field(ge=1)
    num_rows: int = Field(ge=1)
    num_tokens: int = Field(ge=1)
    since: int = Field(ge=1)
    """The record that first committed its samples (the oldest of them): of two copies of a sample,
    the one with the lower number is served, for ever."""

    @model_validator(mode="after")
    def _batches_hold_all_rows(self) -> "ShardRecord":
        if sum(self.batch_rows) != self.num_rows or min(self.batch_rows, default=0) < 1:
            raise ValueError(f"batch_rows must be positive and sum to {self.num_rows} rows")
        return self

    def file(self, table: str) -> FileRecord:
        """The file of a table: ``labels`` or ``samples``."""
        return self.labels if table == "labels" else self.samples

    @property
    def num_bytes(self) -> int:
        """Size of both files."""
        return self.labels.num_bytes + self.samples.num_bytes


class IndexRecord(Config):
    """The index of a record's samples: which keys, and where they lie."""

    name: Name
    file: FileRecord
    num_samples: int = Field(ge=1)
    first_keys: tuple[SampleKey, ...] = Field(min_length=1)
    """First sample key of every record batch of the file, in ascending order."""

    @model_validator(mode="after")
    def _first_keys_ascend(self) -> "IndexRecord":
        if list(self.first_keys) != sorted(self.first_keys):
            raise ValueError("first_keys must ascend")
        return self


class MergedShards(Config):
    """The shards of a merged record and the indexes of their samples, in files of their own."""

    name: Name
    file: FileRecord
    """The table of the shards, ``index/<name>.shards.arrow``."""
    num_shards: int = Field(ge=1)
    num_samples: int = Field(ge=1)
    indexes: tuple[IndexRecord, ...] = Field(min_length=1)
    """One after the other in key order; no key is in two of them."""

    @model_validator(mode="after")
    def _indexes_ascend(self) -> "MergedShards":
        firsts = [index.first_keys[0] for index in self.indexes]
        lasts = [index.first_keys[-1] for index in self.indexes]
        if any(last >= first for last, first in zip(lasts, firsts[1:], strict=False)):
            raise ValueError("indexes must follow on each other in key order")
        return self


class CommitRecord(Document):
    """What one writer changed in one step; or, merged, what many did."""

    damage: ClassVar[type[LabelStoreError]] = ShardCorruptError

    format: Literal[1] = FORMAT_VERSION
    label_set: str
    first: int = Field(ge=1)
    last: int = Field(ge=1)
    """Equal to ``first``, except in a merged record, which stands for all records in between."""
    removed: tuple[Name, ...] = ()
    """Shards that earlier records added and that are not served any more."""
    shards: tuple[ShardRecord, ...] = ()
    """Shards that are added, after the removals."""
    index: IndexRecord | None = None
    """Of the added shards; None where there are none."""
    merged_shards: MergedShards | None = None
    """Of a merged record, what it adds, instead of ``shards`` and ``index``."""
    deleted: tuple[Name, ...] = ()
    """Names that ``gc`` is about to delete: a writer that was going to commit one makes another."""
    dropped: bool = False
    """``rm`` dropped the set with this record; whoever adds to it afterwards makes it anew."""
    partition_bits: int | None = Field(default=None, ge=0, le=16)
    """log2 of the number of partitions from here on; None leaves it."""
    created_at: str
    """UTC, ISO 8601. Information only: nothing is ordered by clocks."""
    provenance: dict[str, str]
    """Backend, engine version, host, git revision, ... of the writer."""

    @model_validator(mode="after")
    def _shards_have_an_index(self) -> "CommitRecord":
        if (self.index is None) != (not self.shards):
            raise ValueError("shards need an index, and only they")
        if self.shards and self.merged_shards is not None:
            raise ValueError("a record has shards or merged_shards, not both")
        return self

    @property
    def num_shards(self) -> int:
        """Shards that are added."""
        return len(self.shards) if self.merged_shards is None else self.merged_shards.num_shards

    @property
    def num_samples(self) -> int:
        """Samples that are added."""
        if self.merged_shards is not None:
            return self.merged_shards.num_samples
        return sum(shard.num_samples for shard in self.shards)

    @property
    def indexes(self) -> tuple[IndexRecord, ...]:
        """The index files of the added shards, one after the other in key order."""
        if self.merged_shards is not None:
            return self.merged_shards.indexes
        return () if self.index is None else (self.index,)

    @property
    def index_names(self) -> list[Name]:
        """Names of the files in ``index/`` that a reader of this record opens."""
        table = [] if self.merged_shards is None else [self.merged_shards.name]
        return [*table, *(index.name for index in self.indexes)]


class LabelSetDocument(Document):
    """``spec.json``: the payload of the key, kept so that a miss can be explained."""

    damage: ClassVar[type[LabelStoreError]] = EditedSpecError

    format: Literal[1] = FORMAT_VERSION
    key: str
    spec: LabelSetSpec
    partition_bits: int = Field(default=0, ge=0, le=16)
    """log2 of the number of partitions, until a commit record says otherwise."""
    provenance: dict[str, str]
    """Names, tokenizer and template of the request that created the set; never identity."""


AnyDocument = TypeVar("AnyDocument", bound=Document)


def sealed(document: AnyDocument) -> AnyDocument:
    """The document with its checksum."""
    blank = document.model_copy(update={"checksum": NO_CHECKSUM})
    return document.model_copy(update={"checksum": _checksum(_to_bytes(blank))})


def to_json(document: Document) -> bytes:
    """The bytes of a document, its checksum included."""
    return _to_bytes(sealed(document))


def parse(kind: type[AnyDocument], data: bytes, *, name: str) -> AnyDocument:
    """Read a document strictly.

    Raises:
        FormatError: naming the file and the first field that is wrong.
        UnsafePathError: if it names a file outside its own folder.
        ShardCorruptError: if a commit record does not have its checksum.
        EditedSpecError: if a spec does not.
    """
    try:
        document = kind.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise FormatError(f"{name} is not a {_title(kind)}: {_first_problem(error)}") from error
    if "format" not in document.model_fields_set:
        raise FormatError(f"{name} is not a {_title(kind)}: it has no member 'format'")
    found = _checksum(_with_checksum(data, NO_CHECKSUM))
    if document.checksum != found:
        raise kind.damage(
            f"{name} does not have its checksum (stated {document.checksum}, found {found}); it "
            "was damaged or edited by hand: run `distill repair`"
        )
    return document


def _to_bytes(document: Document) -> bytes:
    return document.model_dump_json(indent=1).encode()


def _checksum(data: bytes) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))


def _with_checksum(data: bytes, checksum: str) -> bytes:
    """The document with another checksum, which is its first member."""
    head, _, tail = data.partition(CHECKSUM_MEMBER)
    return head + CHECKSUM_MEMBER + checksum.encode() + tail[len(checksum) :]


def _title(kind: type[Document]) -> str:
    return f"{kind.__name__} of format {FORMAT_VERSION}"


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']} (got {first.get('input')!r:.80})"
