"""The JSON documents of a label set: its spec and its numbered commit records.

A commit record is the only thing that makes a shard exist. Records are created with
put-if-absent under consecutive numbers, so any number of writers agree on one history.
"""

import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from storage.config import Config
from storage.errors import FormatError
from storage.keys import LabelSetSpec
from storage.schema import FORMAT_VERSION

_SAFE_NAME = re.compile(r"[0-9a-z][0-9a-z._-]*")


def _safe_name(name: str) -> str:
    """A name inside the label set's own folder: no separators, no parent."""
    if not _SAFE_NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


Document = TypeVar("Document", bound=Config)

FileName = Annotated[str, AfterValidator(_safe_name)]


class FileRecord(Config):
    """One immutable file of a shard."""

    name: FileName
    num_bytes: int = Field(ge=0)
    xxh3_128: str


class ShardRecord(Config):
    """One shard of a commit."""

    labels: FileRecord
    samples: FileRecord
    num_samples: int = Field(ge=1)
    num_rows: int = Field(ge=1)
    num_tokens: int = Field(ge=1)


class CommitRecord(Config):
    """What one writer added in one step."""

    format: Literal[0] = FORMAT_VERSION
    label_set: str
    number: int = Field(ge=1)
    shards: tuple[ShardRecord, ...]
    created_at: str
    """UTC, ISO 8601. Information only: nothing is ordered by clocks."""
    provenance: dict[str, str]
    """Backend, engine version, host, git revision, ... of the writer."""


class LabelSetDocument(Config):
    """``spec.json``: the payload of the key, kept so that a miss can be explained."""

    format: Literal[0] = FORMAT_VERSION
    key: str
    spec: LabelSetSpec
    provenance: dict[str, str]
    """Names, tokenizer and template of the request that created the set; never identity."""


def parse(kind: type[Document], data: bytes, *, name: str) -> Document:
    """Read a document strictly.

    Raises:
        FormatError: naming the file and the first field that is wrong.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(
            f"{name} is not a {kind.__name__} of format {FORMAT_VERSION}: "
            f"{where}: {first['msg']} (got {first.get('input')!r:.80})"
        ) from error
