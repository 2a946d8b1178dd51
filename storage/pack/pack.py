"""Write what a label set serves to an archive."""

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, cast

import zstandard

from storage.errors import ShardCorruptError
from storage.label_set import LabelSet
from storage.pack.manifest import CARD, MANIFEST, TABLES, PackManifest, data_card, member_name
from storage.pack.streams import sink
from storage.records import ShardRecord, to_json

ZSTD_LEVEL = 1
"""Shards are compressed already."""


@dataclass(frozen=True, slots=True)
class Packed:
    """What was packed."""

    key: str
    num_samples: int
    num_tokens: int
    num_bytes: int
    """Of the archive."""


def pack(
    label_set: LabelSet,
    target: str,
    provenance: dict[str, str],
    *,
    licence: str | None = None,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> Packed:
    """Write what a label set serves now to an archive.

    Args:
        label_set: The set.
        target: A path, ``-`` for stdout, or an object such as ``s3://bucket/labels.tar.zst``.
        provenance: Recorded in the archive.
        licence: Licence of the labels, for the data card.
        advance: Called with the bytes that were read, for progress bars.

    Raises:
        LabelStoreError: if the target cannot be written; nothing half-written stays.
        ShardCorruptError: if a shard is not what was committed.
    """
    manifest = PackManifest(
        document=label_set.document,
        shards=tuple(label_set.live_shards()),
        licence=licence,
        provenance=provenance,
    )
    with sink(target) as file:
        counted = _Counted(file)
        compressor = zstandard.ZstdCompressor(ZSTD_LEVEL, threads=-1, write_checksum=True)
        with (
            compressor.stream_writer(cast(IO[bytes], counted), closefd=False) as compressed,
            tarfile.open(fileobj=compressed, mode="w|", format=tarfile.USTAR_FORMAT) as archive,
        ):
            _add(archive, MANIFEST, to_json(manifest))
            _add(archive, CARD, data_card(label_set, manifest).encode())
            for shard in manifest.shards:
                for table in TABLES:
                    data = _committed_bytes(label_set, shard, table)
                    _add(archive, member_name(shard, table), data)
                    advance(len(data))
    totals = label_set.totals()
    return Packed(label_set.key, totals.num_samples, totals.num_tokens, counted.num_bytes)


def _committed_bytes(label_set: LabelSet, shard: ShardRecord, table: str) -> bytes:
    path = label_set.shard_path(shard.name, table)
    try:
        data = label_set.objects.get(path)
    except FileNotFoundError as error:
        raise ShardCorruptError(
            f"{error}: it was replaced while the set was packed, or it is lost; pack again, and "
            "run `distill verify` if that does not help"
        ) from error
    shard.file(table).require(data, name=f"{label_set.objects.uri}/{path}")
    return data


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


class _Counted(io.RawIOBase):
    """A sink that counts what goes through it."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        self.num_bytes += len(data)
        self._sink.write(data)
        return len(data)

    def flush(self) -> None:
        self._sink.flush()
