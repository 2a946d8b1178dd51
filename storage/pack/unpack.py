"""Add the samples of an archive to a store: nothing becomes visible before all was checked."""

import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import zstandard

from storage.errors import (
    EditedSpecError,
    OversizedError,
    ShardCorruptError,
    UnsafePathError,
)
from storage.index import format_keys
from storage.label_set import LabelSet
from storage.pack.manifest import CARD, MANIFEST, TABLES, PackManifest, member_name
from storage.pack.streams import END, decompressed
from storage.records import ShardRecord, parse
from storage.store import LabelStore
from storage.verify import check_shard
from storage.writer import NewShard, Part, SamplesPart, commit, copy_shard, publish

MAX_MANIFEST_BYTES = 2**28
"""A manifest takes about 500 bytes per shard."""
MAX_CARD_BYTES = 2**26
COPY_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What was unpacked."""

    key: str
    num_samples: int
    """In the archive."""
    num_new: int
    """Committed now; the store had the others already."""


class _UnpackedShard(Part):
    """A checked shard of an archive, to be copied as it is unless some samples are stored."""

    def __init__(self, source: LabelSet, shard: NewShard) -> None:
        super().__init__(format_keys(shard.entries.keys))
        self._source, self._shard = source, shard

    def write(self, label_set: LabelSet) -> NewShard:
        """Copy both files."""
        return copy_shard(self._source, self._shard, label_set)

    def without(self, stored: set[str]) -> Part | None:
        """The other samples, to be encoded anew."""
        left = [key for key in self.keys if key not in stored]
        return SamplesPart(list(self._source.read(left))) if left else None


class _Receiver:
    """Takes the members of an archive, as they come, into a label set of a local store.

    Nothing but the members that the manifest names is read, so no header can ask for memory.

    Args:
        stream: The archive.
        source: What to call it in errors.
    """

    def __init__(self, stream: IO[bytes], source: str) -> None:
        self._stream, self._source = stream, source

    def receive(self, received: LabelStore) -> tuple[PackManifest, LabelSet]:
        """Everything that the manifest names, and nothing else."""
        data = self._content(MANIFEST, MAX_MANIFEST_BYTES)
        manifest = parse(PackManifest, data, name=f"{self._source}: {MANIFEST}")
        self._check(manifest, received)
        label_set = received.create(manifest.document.spec, manifest.document.provenance)
        self._content(CARD, MAX_CARD_BYTES)
        for shard in manifest.shards:
            for table in TABLES:
                self._file(shard, table, label_set)
        self._require_end()
        return manifest, label_set

    def _require_end(self) -> None:
        """Nothing but the padding of the archive may follow, and the mark behind its source."""
        limit = tarfile.RECORDSIZE + tarfile.BLOCKSIZE + len(END)
        rest = b""
        while len(rest) <= limit and (part := self._stream.read(tarfile.BLOCKSIZE)):
            rest += part
        if rest.removesuffix(END).strip(tarfile.NUL):
            raise UnsafePathError(f"{self._source!r} holds more than what is in its list")
        if not rest.endswith(END):
            raise ShardCorruptError(f"{self._source!r} is cut short")

    def _check(self, manifest: PackManifest, received: LabelStore) -> None:
        """Refuse what cannot be right before anything is written."""
        document = manifest.document
        if document.spec.key != document.key:
            raise EditedSpecError(
                f"{self._source!r}: the spec in its manifest has the key {document.spec.key}, "
                f"stated is {document.key}; it was edited"
            )
        needed = sum(shard.num_bytes for shard in manifest.shards)
        free = shutil.disk_usage(received.uri).free
        if needed > free:
            raise OversizedError(
                f"{self._source!r} unpacks to {needed} bytes, {received.uri} has {free} bytes "
                "free; set TMPDIR to a folder with more room"
            )

    def _file(self, shard: ShardRecord, table: str, label_set: LabelSet) -> None:
        file = shard.file(table)
        member = self._next(member_name(shard, table))
        if member.size != file.num_bytes:
            raise OversizedError(
                f"{self._source!r}: {member.name!r} has {member.size} bytes, its manifest says "
                f"{file.num_bytes}"
            )
        path = Path(label_set.objects.uri) / label_set.shard_path(shard.name, table)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            for chunk in self._chunks(member):
                out.write(chunk)

    def _content(self, name: str, limit: int) -> bytes:
        member = self._next(name)
        if member.size > limit:
            raise OversizedError(
                f"{self._source!r}: {name} has {member.size} bytes, at most {limit} are allowed"
            )
        return b"".join(self._chunks(member))

    def _next(self, name: str) -> tarfile.TarInfo:
        """The next member, which must be a plain file of this name."""
        header = self._exactly(tarfile.BLOCKSIZE)
        if header == tarfile.NUL * tarfile.BLOCKSIZE:
            raise ShardCorruptError(f"{self._source!r} ends where {name!r} should come")
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        if member.name != name or not member.isreg():
            raise UnsafePathError(
                f"{self._source!r} holds {member.name!r} where the plain file {name!r} should be"
            )
        return member

    def _chunks(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        """The content of a member; the stream stands behind its last block then."""
        for start in range(0, member.size, COPY_BYTES):
            yield self._exactly(min(COPY_BYTES, member.size - start))
        self._exactly(-member.size % tarfile.BLOCKSIZE)

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size > 0:
            part = self._stream.read(size)
            if not part:
                raise EOFError("it ends too early")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def unpack(
    source: str,
    store: LabelStore,
    provenance: dict[str, str],
    *,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> Unpacked:
    """Add the samples of an archive to a store, in one commit.

    Samples that the store has already stay as they are.

    Args:
        source: A path, ``-`` for stdin, or an object such as ``s3://bucket/labels.tar.zst``.
        store: Where the samples go.
        provenance: Recorded with the commit.
        advance: Called with the bytes of every shard that was checked, for progress bars.

    Raises:
        WrongMagicError: if the source is no zstd stream.
        UnsafePathError: if a member is not the one that the manifest names.
        OversizedError: if a member is larger than stated, or all are too large for the disk.
        EditedSpecError: if the spec does not have its key.
        ShardCorruptError: if a byte differs from what was packed, or the end is missing.
        BadLabelError: if a label cannot be one.
    """
    with tempfile.TemporaryDirectory(prefix="unpack-") as folder:
        manifest, label_set = _receive(source, LabelStore(folder))
        shards = []
        for shard in sorted(manifest.shards, key=lambda shard: shard.since):
            shards.append(NewShard(shard, check_shard(label_set, shard)))
            advance(shard.num_bytes)
        publish(label_set, shards, provenance={})  # in the local store: samples can be read
        target = store.create(
            manifest.document.spec,
            manifest.document.provenance,
            expected_tokens=sum(shard.num_tokens for shard in manifest.shards),
        )
        record = commit(target, list(_parts(label_set, shards)), provenance)
    num_new = record.num_samples if record is not None else 0
    return Unpacked(target.key, manifest.num_samples, num_new)


def _parts(label_set: LabelSet, shards: Sequence[NewShard]) -> Iterator[Part]:
    """The shards of an archive, the oldest first, every sample once."""
    seen: set[str] = set()
    for shard in shards:
        whole = _UnpackedShard(label_set, shard)
        part = whole.without(seen) if seen.intersection(whole.keys) else whole
        if part is not None:
            yield part
        seen.update(whole.keys)


def _receive(source: str, received: LabelStore) -> tuple[PackManifest, LabelSet]:
    """All members of an archive, up to the checksum at its end.

    Raises:
        ShardCorruptError: if the stream is damaged or cut short.
    """
    try:
        with decompressed(source) as stream:
            return _Receiver(stream, source).receive(received)
    except (zstandard.ZstdError, tarfile.TarError, EOFError) as error:
        raise ShardCorruptError(f"{source!r} is damaged or cut short: {error}") from error
