"""What a checkpoint consists of, and for which training it was written.

A checkpoint is a folder of files of DeepSpeed, which are pickles, and of ours. Its manifest is
written last, so a folder without one is a leftover. It holds size and digest of every file: they
are compared before anything is unpickled.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from storage.config import Config
from storage.files import write_atomically

MANIFEST_FILE = "manifest.json"


class FileDigest(Config):
    """Content of a file."""

    bytes: int = Field(ge=0)
    """Its size."""
    sha256: str
    """Its digest, in hex."""


class Manifest(Config):
    """A checkpoint."""

    format: Literal[1] = 1
    """Version of this layout."""
    step: int = Field(ge=1)
    """Finished optimiser steps; the position in the data follows from it."""
    world_size: int = Field(ge=1)
    """Ranks that wrote it."""
    settings: dict[str, Any]
    """What must be equal to go on, by the names of its fields."""
    state: dict[str, Any]
    """What moves with the steps beside the engine."""
    files: dict[str, FileDigest]
    """Every file of the folder but the manifest, by its path in it."""

    def save(self, directory: Path) -> None:
        """Write it: the checkpoint exists from here on."""
        write_atomically(directory / MANIFEST_FILE, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read it.

        Raises:
            ValueError: if it is damaged.
        """
        try:
            return cls.model_validate(json.loads((directory / MANIFEST_FILE).read_bytes()))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"its entry {where!r} is wrong: {first['msg']}") from error


def digest_file(file: Path) -> FileDigest:
    """Size and digest of a file as it is on disk."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileDigest(bytes=file.stat().st_size, sha256=digest)


def files_in(directory: Path) -> list[str]:
    """Paths of all files of a checkpoint but its manifest, sorted."""
    found = (
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )
    return sorted(path for path in found if path != MANIFEST_FILE)


def damage(directory: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """The first thing that is wrong with some files of a checkpoint; None where nothing is."""
    unknown = [name for name in files_in(directory) if name not in manifest.files]
    if unknown:
        return f"{directory / unknown[0]} is not in its manifest"
    for name in names:
        file, expected = directory / name, manifest.files[name]
        if not file.is_file():
            return f"{file} is missing"
        size = file.stat().st_size
        if size != expected.bytes:
            return f"{file} has {size} bytes instead of {expected.bytes}"
        if digest_file(file).sha256 != expected.sha256:
            return f"{file} has other bytes than were written"
    return None


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for every field that differs."""
    unset = "unset"
    return [
        f"{name}: {_text(saved.get(name, unset))} in the checkpoint, "
        f"{_text(wanted.get(name, unset))} now"
        for name in sorted({*saved, *wanted})
        if saved.get(name, unset) != wanted.get(name, unset)
    ]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def flattened(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested settings as one mapping from dotted names to values."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        path = f"{prefix}.{name}"
        flat |= flattened(value, path) if isinstance(value, Mapping) else {path: value}
    return flat
