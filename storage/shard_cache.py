"""A bounded folder of local copies of remote files.

Training reads a label set again in every epoch, and from several places at once; a copy is
fetched whole, checked against the checksum in its commit record, and shared by all processes of a
host. A damaged or half-written copy is never served: it is fetched again.
"""

import os
import tempfile
from pathlib import Path

import pyarrow as pa

from storage.errors import ShardCorruptError
from storage.objects import Objects
from storage.records import FileRecord


class ShardCache:
    """Local copies of immutable files, the last used ones first.

    Processes of a host may share a directory: a copy appears whole or not at all, and one that is
    removed stays readable where it is open.

    Args:
        directory: Where copies lie; made if missing.
        max_bytes: Copies beyond this size in total are removed, the longest unused first. A single
            file may be larger; it is then the only one.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._checked: set[str] = set()
        directory.mkdir(parents=True, exist_ok=True)

    def open(self, objects: Objects, path: str, record: FileRecord) -> pa.NativeFile:
        """The local copy of an object, fetched if there is none.

        Args:
            objects: The store.
            path: Of the object in it.
            record: Its size and checksum.

        Raises:
            FileNotFoundError: if the object does not exist.
            ShardCorruptError: if the object itself does not have this size and checksum.
            StoreAccessError: if it cannot be read.
        """
        copy = self._directory / f"{record.xxh3_128}.arrow"
        file = self._open_copy(copy, record)
        if file is None:
            data = objects.get(path)
            record.require(data, name=f"{objects.uri}/{path}")
            self._make_room(record.num_bytes)
            file = self._write(copy, data)
        self._checked.add(copy.name)
        return file

    def _open_copy(self, copy: Path, record: FileRecord) -> pa.NativeFile | None:
        try:
            if copy.name not in self._checked:
                record.require(copy.read_bytes(), name=str(copy))
            os.utime(copy)  # used now
            return pa.OSFile(str(copy))
        except FileNotFoundError:
            return None
        except ShardCorruptError:  # of the copy, not of the object
            copy.unlink(missing_ok=True)
            return None

    def _write(self, copy: Path, data: bytes) -> pa.NativeFile:
        handle, name = tempfile.mkstemp(dir=self._directory, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            file = pa.OSFile(name)  # open before anybody can remove it
            Path(name).replace(copy)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return file

    def _make_room(self, num_bytes: int) -> None:
        """Remove the longest unused copies until so many bytes fit."""
        found = []
        for copy in self._directory.glob("*.arrow"):
            try:
                facts = copy.stat()
            except FileNotFoundError:  # another process removed it
                continue
            found.append((facts.st_mtime_ns, facts.st_size, copy))
        used = sum(size for _, size, _ in found)
        for _, size, copy in sorted(found, key=lambda entry: entry[:2]):
            if used + num_bytes <= self._max_bytes:
                return
            copy.unlink(missing_ok=True)
            self._checked.discard(copy.name)
            used -= size
