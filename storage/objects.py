"""Objects of a store by relative path: one code path for a local directory, S3, GCS and Azure.

The store needs four things of its medium: read a whole object or a range, list a prefix, and
*create an object only if it does not exist*. obstore does them for every medium; credentials come
from the environment or the provider's own chain and are never written anywhere.
"""

import contextlib
import datetime
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
import pyarrow as pa
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from storage.errors import StoreAccessError
from storage.files import create_durably

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

REMOTE_SCHEMES = ("s3://", "gs://", "az://")

REMOTE_RETRY: "RetryConfig" = {
    "max_retries": 1000,
    "retry_timeout": datetime.timedelta(seconds=45),
}
"""A lost network is reported after about a minute; shorter interruptions are not noticed."""

REMOTE_CLIENT: "ClientConfig" = {"connect_timeout": "10s", "timeout": "60s"}

CLOCK = "clock"
"""An empty object of remote stores that is written to learn the store's time."""

_UNFINISHED = re.compile(r".*#\d+")
"""Names under which a local object is prepared before it appears; listings leave them out."""


class Objects:
    """The objects below one URI.

    Args:
        uri: A local path, ``file://``, ``s3://``, ``gs://`` or ``az://``.
        create: Make a missing local directory; a missing one reads as empty otherwise.
    """

    def __init__(self, uri: str, *, create: bool = False) -> None:
        self.uri = uri
        self.root: Path | None = None
        if uri.startswith(REMOTE_SCHEMES):
            try:
                self._store: ObjectStore | None = from_url(
                    uri, retry_config=REMOTE_RETRY, client_options=_client_options()
                )
            except (BaseError, ValueError) as error:
                raise StoreAccessError(f"cannot open store {uri!r}: {_reason(error)}") from error
            return
        if "://" in uri and not uri.startswith("file://"):
            raise StoreAccessError(
                f"store {uri!r} has an unknown scheme; "
                f"use a local path or one of {', '.join(REMOTE_SCHEMES)}"
            )
        self.root = Path(uri.removeprefix("file://")).absolute()
        if create:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreAccessError(f"cannot create store {uri!r}: {error}") from error
        self._store = LocalStore(self.root) if self.root.is_dir() else None

    @property
    def exists(self) -> bool:
        """False for a local store whose directory is missing."""
        return self._store is not None

    def get(self, path: str) -> bytes:
        """Whole content of an object.

        Raises:
            FileNotFoundError: if it does not exist.
            StoreAccessError: if it cannot be read.
        """
        if self._store is None:
            raise FileNotFoundError(f"{self.uri}/{path} does not exist")
        try:
            return bytes(obstore.get(self._store, path).bytes())
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.uri}/{path} does not exist") from None
        except (BaseError, OSError) as error:
            raise StoreAccessError(f"cannot read {self.uri}/{path}: {_reason(error)}") from error

    def open(self, path: str) -> tuple[pa.NativeFile, int]:
        """An object as a random-access file, and its size in bytes; only what is read is fetched.

        Raises:
            FileNotFoundError: if it does not exist.
            StoreAccessError: if it cannot be opened.
        """
        try:
            if self.root is not None:
                file = pa.OSFile(str(self.root / path))
                return file, file.size()
            size = int(obstore.head(self._existing(), path)["size"])
            ranges = _Ranges(self._existing(), path, size, f"{self.uri}/{path}")
            return pa.PythonFile(ranges, mode="r"), size
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.uri}/{path} does not exist") from None
        except (BaseError, OSError) as error:
            raise StoreAccessError(f"cannot read {self.uri}/{path}: {_reason(error)}") from error

    def upload(self, path: str, content: Path | bytes) -> None:
        """Put a local file of any size, or bytes, under a name; replaces an older object whole.

        Raises:
            StoreAccessError: if it cannot be written.
        """
        try:
            obstore.put(self._existing(), path, content)
        except (BaseError, OSError) as error:
            raise StoreAccessError(f"cannot write {self.uri}/{path}: {_reason(error)}") from error

    def create_own(self, path: str, data: bytes) -> None:
        """Create an object under a name that nobody else uses.

        A request whose answer is lost on the way is sent again, and then finds its own object.

        Raises:
            StoreAccessError: if it cannot be written, or another object has the name.
        """
        if not self.create(path, data) and self.get(path) != data:
            raise StoreAccessError(f"{self.uri}/{path} exists already with another content")

    def create(self, path: str, data: bytes) -> bool:
        """Create an object in one step; never replaces one.

        The bytes are durable when this returns: a local file is flushed to disk with its
        directory, an object store acknowledges a whole object or none.

        Returns:
            False if the object existed already.

        Raises:
            StoreAccessError: if it cannot be written (permission, full disk, lost connection).
        """
        if self._store is None:
            raise StoreAccessError(f"store {self.uri!r} does not exist")
        try:
            if self.root is not None:
                return create_durably(self.root / path, data)
            obstore.put(self._store, path, data, mode="create")
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise StoreAccessError(
                f"cannot write {self.uri}/{path}: {_reason(error)}; "
                "what was committed before is intact"
            ) from error
        return True

    def delete(self, path: str) -> None:
        """Remove an object; one that does not exist is no error.

        Raises:
            StoreAccessError: if it cannot be removed.
        """
        try:
            if self.root is not None:
                (self.root / path).unlink(missing_ok=True)
            else:
                obstore.delete(self._existing(), path)
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            raise StoreAccessError(f"cannot remove {self.uri}/{path}: {_reason(error)}") from error

    def paths(self, prefix: str, *, after: str | None = None) -> Iterator[str]:
        """Paths of all objects below ``prefix/``, sorted; only those behind ``after`` if given.

        Raises:
            StoreAccessError: if they cannot be listed.
        """
        return (path for path, _, _ in self.entries(prefix, after=after))

    def entries(
        self, prefix: str, *, after: str | None = None
    ) -> Iterator[tuple[str, int, datetime.datetime]]:
        """Path, size in bytes and time of creation (by the store's clock), sorted by path.

        Raises:
            StoreAccessError: if they cannot be listed.
        """
        if self._store is None:
            return iter(())
        try:
            listing = obstore.list(self._store, prefix=prefix, offset=after)
            found = [
                (meta["path"], meta["size"], meta["last_modified"])
                for batch in listing
                for meta in batch
            ]
        except (BaseError, OSError) as error:
            raise StoreAccessError(f"cannot list {self.uri}/{prefix}: {_reason(error)}") from error
        return iter(sorted(found))

    def now(self) -> datetime.datetime:
        """The time by the store's own clock, which also dates its objects: no skew between hosts.

        Raises:
            StoreAccessError: if the store cannot be written.
        """
        try:
            if self.root is not None:
                with tempfile.TemporaryFile(dir=self.root) as file:
                    return _modified(os.fstat(file.fileno()))
            obstore.put(self._existing(), CLOCK, b"")
            return obstore.head(self._existing(), CLOCK)["last_modified"]
        except (BaseError, OSError) as error:
            raise StoreAccessError(f"cannot write to {self.uri}: {_reason(error)}") from error

    def unfinished(self, prefix: str) -> Iterator[tuple[str, int, datetime.datetime]]:
        """Local files below ``prefix/`` that are half-written: path, size in bytes and time."""
        if self.root is None:
            return
        for file in sorted((self.root / prefix).rglob("*")):
            if _UNFINISHED.fullmatch(file.name):
                with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                    found = file.stat()
                    yield str(file.relative_to(self.root)), found.st_size, _modified(found)

    def directories(self, prefix: str) -> list[str]:
        """Names directly below ``prefix/`` that contain objects, sorted.

        Raises:
            StoreAccessError: if they cannot be listed.
        """
        if self._store is None:
            return []
        try:
            listing = obstore.list_with_delimiter(self._store, prefix=prefix)
        except (BaseError, OSError) as error:
            raise StoreAccessError(f"cannot list {self.uri}/{prefix}: {_reason(error)}") from error
        return sorted(path.rsplit("/", 1)[-1] for path in listing["common_prefixes"])

    def _existing(self) -> ObjectStore:
        if self._store is None:
            raise StoreAccessError(f"store {self.uri!r} does not exist")
        return self._store


class _Ranges:
    """A remote object as a file of which exactly what is read is fetched."""

    closed = False

    def __init__(self, store: ObjectStore, path: str, size: int, name: str) -> None:
        self._store, self._path, self._size, self._name = store, path, size, name
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        rest = self._size - self._position
        length = rest if size < 0 else min(size, rest)
        if length <= 0:
            return b""
        try:
            found = obstore.get_range(self._store, self._path, start=self._position, length=length)
        except (BaseError, OSError) as error:
            raise StoreAccessError(f"cannot read {self._name}: {_reason(error)}") from error
        self._position += length
        return bytes(found)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


def _client_options() -> "ClientConfig":
    # options given here replace the one that the environment sets
    allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    return {**REMOTE_CLIENT, "allow_http": allow_http}


def _modified(found: os.stat_result) -> datetime.datetime:
    seconds, nanoseconds = divmod(found.st_mtime_ns, 10**9)
    whole = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return whole.replace(microsecond=nanoseconds // 1000)


def _reason(error: Exception) -> str:
    """The first line of an error: obstore appends a dump of its internal state."""
    return str(error).partition("\n")[0]
