"""Copies of checkpoints in an object store or in another directory.

A copy is made of the same files as the checkpoint. Its manifest is written last and removed first,
so a copy that has one is whole.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from storage.files import write_atomically
from storage.objects import Objects
from student_train.checkpoints.manifest import MANIFEST_FILE

BLOCK_BYTES = 2**24


class CheckpointCopies:
    """The copies of one training.

    Args:
        uri: A directory, ``s3://``, ``gs://`` or ``az://``.
        name: Folder of the training there.
    """

    def __init__(self, uri: str, name: str) -> None:
        self._objects = Objects(uri, create=True)
        self._name = name
        self.uri = f"{self._objects.uri}/{name}"
        """Where they are."""

    def tags(self) -> list[str]:
        """Names of all whole copies, sorted.

        Raises:
            StoreAccessError: if they cannot be listed.
        """
        paths = [Path(path) for path in self._objects.paths(self._name)]
        return sorted(path.parts[1] for path in paths if path.parts[2:] == (MANIFEST_FILE,))

    def upload(self, directory: Path, names: Iterable[str]) -> None:
        """Copy some files of the checkpoint in ``directory``.

        Raises:
            StoreAccessError: if they cannot be written.
        """
        for name in names:
            self._objects.upload(f"{self._name}/{directory.name}/{name}", directory / name)

    def commit(self, directory: Path) -> None:
        """The copy of the checkpoint in ``directory`` is whole from here on.

        Raises:
            StoreAccessError: if it cannot be written.
        """
        self.upload(directory, [MANIFEST_FILE])

    def keep(self, tags: Iterable[str]) -> None:
        """Remove every other copy, and what interrupted ones left.

        Raises:
            StoreAccessError: if they cannot be removed.
        """
        kept = set(tags)
        paths = list(self._objects.paths(self._name))
        # manifests first: what is left without one is no copy
        for path in sorted(paths, key=lambda path: Path(path).name != MANIFEST_FILE):
            if Path(path).parts[1] not in kept:
                self._objects.delete(path)

    def fetch_manifest(self, directory: Path) -> None:
        """Bring the manifest of the copy called as ``directory`` there.

        Raises:
            StoreAccessError: if it cannot be read.
        """
        data = self._objects.get(f"{self._name}/{directory.name}/{MANIFEST_FILE}")
        write_atomically(directory / MANIFEST_FILE, data)

    def fetch(self, directory: Path, names: Iterable[str]) -> None:
        """Bring some files of the copy called as ``directory`` there.

        Raises:
            FileNotFoundError: if the copy lacks one.
            StoreAccessError: if they cannot be read.
        """
        for name in names:
            source, _ = self._objects.open(f"{self._name}/{directory.name}/{name}")
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("wb") as stream:
                shutil.copyfileobj(source, stream, BLOCK_BYTES)
