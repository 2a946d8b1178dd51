"""Where archives come from and go to: files, the standard streams, object stores."""

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import zstandard

from storage.errors import LabelStoreError, WrongMagicError
from storage.files import fsync_directory
from storage.objects import REMOTE_SCHEMES, Objects

STANDARD_STREAM = "-"
READ_BYTES = 2**23
"""Remote archives are fetched in such pieces."""
MAX_WINDOW_BYTES = 2**27
"""Memory that decompression may take, whatever the stream asks for."""
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
END = b"end of the archive"
END_FRAME = zstandard.ZstdCompressor().compress(END)
"""Read behind a source. Were the source cut short, this would be taken for the rest of it, and fail
its checksum: that END comes out proves that everything before it was complete."""


@contextmanager
def sink(target: str) -> Iterator[IO[bytes]]:
    """Where an archive is written; it appears under its name when it is complete.

    Raises:
        LabelStoreError: if it cannot be written; nothing half-written stays.
    """
    if target == STANDARD_STREAM:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    remote = target.startswith(REMOTE_SCHEMES)
    final = Path(target).absolute()
    try:
        where = None if remote else final.parent
        with tempfile.TemporaryDirectory(prefix=f".{final.name}.tmp-", dir=where) as folder:
            temporary = Path(folder) / "archive"
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if remote:
                parent, _, name = target.rpartition("/")
                Objects(parent).upload(name, temporary)
            else:
                temporary.replace(final)
                fsync_directory(final.parent)
    except OSError as error:
        raise LabelStoreError(f"cannot write {target!r}: {error}") from error


@contextmanager
def decompressed(source: str) -> Iterator[IO[bytes]]:
    """The decompressed content of an archive, followed by END.

    Reading raises ``zstandard.ZstdError`` where the source is damaged.

    Raises:
        WrongMagicError: if the source is no zstd stream.
        LabelStoreError: if it cannot be read.
    """
    with _opened(source) as raw:
        head = raw.read(len(ZSTD_MAGIC))
        if head != ZSTD_MAGIC:
            raise WrongMagicError(
                f"{source!r} is no zstd stream (it begins with {head!r}); "
                "give an archive that `distill pack` wrote"
            )
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        chained = cast(IO[bytes], _Chained(head, raw, END_FRAME))
        yield decompressor.stream_reader(chained, read_across_frames=True)


class _Chained(io.RawIOBase):
    """Some bytes, a stream, and some more bytes, as one stream."""

    def __init__(self, head: bytes, middle: Any, tail: bytes) -> None:
        self._head, self._middle, self._tail = head, middle, tail

    def read(self, size: int = -1) -> bytes:
        head, self._head = self._head, b""
        data = head or bytes(self._middle.read(size))
        if not data:
            data, self._tail = self._tail, b""
        return data


@contextmanager
def _opened(source: str) -> Iterator[Any]:
    try:
        if source == STANDARD_STREAM:
            yield sys.stdin.buffer
        elif source.startswith(REMOTE_SCHEMES):
            folder, _, name = source.rpartition("/")
            with Objects(folder).open(name)[0] as file:
                yield pa.BufferedInputStream(file, READ_BYTES)
        else:
            with Path(source).open("rb") as file:
                yield file
    except OSError as error:
        raise LabelStoreError(f"cannot read {source!r}: {error}") from error
