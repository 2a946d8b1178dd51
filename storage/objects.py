"""Objects of a store by relative path: one code path for a local directory, S3, GCS and Azure.

The store needs four things of its medium: read a whole object or a range, list a prefix, and
*create an object only if it does not exist*. obstore does them for every medium; credentials come
from the environment or the provider's own chain and are never written anywhere.
"""

from collections.abc import Iterator
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from storage.errors import LabelStoreError
from storage.files import fsync_directory, fsync_file

REMOTE_SCHEMES = ("s3://", "gs://", "az://")


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
                self._store: ObjectStore | None = from_url(uri)
            except (BaseError, ValueError) as error:
                raise LabelStoreError(f"cannot open store {uri!r}: {_reason(error)}") from error
            return
        if "://" in uri and not uri.startswith("file://"):
            raise LabelStoreError(
                f"store {uri!r} has an unknown scheme; "
                f"use a local path or one of {', '.join(REMOTE_SCHEMES)}"
            )
        self.root = Path(uri.removeprefix("file://")).absolute()
        if create:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LabelStoreError(f"cannot create store {uri!r}: {error}") from error
        self._store = LocalStore(self.root) if self.root.is_dir() else None

    @property
    def exists(self) -> bool:
        """False for a local store whose directory is missing."""
        return self._store is not None

    def get(self, path: str) -> bytes:
        """Whole content of an object.

        Raises:
            FileNotFoundError: if it does not exist.
            LabelStoreError: if it cannot be read.
        """
        if self._store is None:
            raise FileNotFoundError(f"{self.uri}/{path} does not exist")
        try:
            return bytes(obstore.get(self._store, path).bytes())
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.uri}/{path} does not exist") from None
        except (BaseError, OSError) as error:
            raise LabelStoreError(f"cannot read {self.uri}/{path}: {_reason(error)}") from error

    def create(self, path: str, data: bytes) -> bool:
        """Create an object in one step; never replaces one.

        The bytes are durable when this returns: a local file is flushed to disk with its
        directory, an object store acknowledges a whole object or none.

        Returns:
            False if the object existed already.

        Raises:
            LabelStoreError: if it cannot be written (permission, full disk, lost connection).
        """
        if self._store is None:
            raise LabelStoreError(f"store {self.uri!r} does not exist")
        makes_directories = self.root is not None and not (self.root / path).parent.is_dir()
        try:
            obstore.put(self._store, path, data, mode="create")
        except AlreadyExistsError:
            return False
        except (BaseError, OSError) as error:
            raise LabelStoreError(
                f"cannot write {self.uri}/{path}: {_reason(error)}; "
                "what was committed before is intact"
            ) from error
        if self.root is not None:
            fsync_file(self.root / path)
            for parent in list(Path(path).parents)[1:] if makes_directories else ():
                fsync_directory(self.root / parent)
        return True

    def delete(self, path: str) -> None:
        """Remove an object; nothing that a commit record names is ever removed this way.

        Raises:
            LabelStoreError: if it cannot be removed.
        """
        try:
            obstore.delete(self._existing(), path)
        except (BaseError, OSError) as error:
            raise LabelStoreError(f"cannot remove {self.uri}/{path}: {_reason(error)}") from error

    def paths(self, prefix: str) -> Iterator[str]:
        """Paths of all objects below ``prefix/``, sorted.

        Raises:
            LabelStoreError: if they cannot be listed.
        """
        if self._store is None:
            return iter(())
        try:
            listing = obstore.list(self._store, prefix=prefix)
            return iter(sorted(meta["path"] for batch in listing for meta in batch))
        except (BaseError, OSError) as error:
            raise LabelStoreError(f"cannot list {self.uri}/{prefix}: {_reason(error)}") from error

    def directories(self, prefix: str) -> list[str]:
        """Names directly below ``prefix/`` that contain objects, sorted.

        Raises:
            LabelStoreError: if they cannot be listed.
        """
        if self._store is None:
            return []
        try:
            listing = obstore.list_with_delimiter(self._store, prefix=prefix)
        except (BaseError, OSError) as error:
            raise LabelStoreError(f"cannot list {self.uri}/{prefix}: {_reason(error)}") from error
        return sorted(path.rsplit("/", 1)[-1] for path in listing["common_prefixes"])

    def _existing(self) -> ObjectStore:
        if self._store is None:
            raise LabelStoreError(f"store {self.uri!r} does not exist")
        return self._store


def _reason(error: Exception) -> str:
    """The first line of an error: obstore appends a dump of its internal state."""
    return str(error).partition("\n")[0]
