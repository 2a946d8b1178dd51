"""Local files that appear whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAGINGS = 10
"""Times that a file is staged before its disappearance is an error."""


def fsync_directory(directory: Path) -> None:
    """Make renames and new names inside ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_durably(path: Path, data: bytes) -> bool:
    """Create ``path`` with ``data`` unless it exists; what becomes visible is on disk already.

    Returns:
        False if it existed; it is left as it is.

    Raises:
        OSError: if it cannot be written; nothing is visible then.
    """
    missing = [parent for parent in path.parents if not parent.is_dir()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, STAGINGS + 1):
        try:
            if not _link_staged(path, data):
                return False
            break
        except FileNotFoundError:  # a collection without grace took the staged file for a leftover
            if attempt == STAGINGS:
                raise
    for directory in (path.parent, *(parent.parent for parent in missing)):
        fsync_directory(directory)
    return True


def _link_staged(path: Path, data: bytes) -> bool:
    """Write a staged file and give it its name; False if the name is taken."""
    staged = path.with_name(f"{path.name}#{uuid.uuid4().int % 10**12}")
    try:
        with staged.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(staged, path)
    except FileExistsError:
        return False
    finally:
        staged.unlink(missing_ok=True)
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: a reader sees the old bytes or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


@contextmanager
def published_directory(final: Path) -> Iterator[Path]:
    """A temporary directory that becomes ``final`` when the block ends without an exception.

    ``final`` appears whole or not at all. What a killed process left of an earlier try is removed,
    so only one process at a time may work on one ``final``.
    """
    for stale in final.parent.glob(f".{final.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = final.with_name(f".{final.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish_directory(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_directory(temporary: Path, final: Path) -> None:
    """Give a finished directory its final name in one step.

    Every file is flushed first. If ``final`` exists already, the other writer was faster and did
    the same work: ours is dropped.
    """
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(temporary)
        return
    fsync_directory(final.parent)
