"""Copies of remote shards: bounded, verified, and never served when damaged."""

import os
from pathlib import Path

import pytest

from storage.errors import ShardCorruptError
from storage.objects import Objects
from storage.records import FileRecord
from storage.shard_cache import ShardCache

CONTENTS = {f"shard-{n}": bytes([n]) * 100 for n in range(5)}


class CountedObjects(Objects):
    """Counts what is fetched."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri, create=True)
        self.fetched: list[str] = []

    def get(self, path: str) -> bytes:
        self.fetched.append(path)
        return super().get(path)


@pytest.fixture
def objects(tmp_path: Path) -> CountedObjects:
    found = CountedObjects(str(tmp_path / "remote"))
    for path, data in CONTENTS.items():
        found.create(path, data)
    return found


def read(cache: ShardCache, objects: Objects, path: str) -> bytes:
    with cache.open(objects, path, FileRecord.of(CONTENTS[path])) as file:
        return file.read()


def test_a_file_is_fetched_once(tmp_path: Path, objects: CountedObjects) -> None:
    cache = ShardCache(tmp_path / "copies", 1000)
    for _ in range(3):
        assert read(cache, objects, "shard-1") == CONTENTS["shard-1"]
    assert objects.fetched == ["shard-1"]


def test_processes_share_a_directory(tmp_path: Path, objects: CountedObjects) -> None:
    read(ShardCache(tmp_path / "copies", 1000), objects, "shard-1")
    assert read(ShardCache(tmp_path / "copies", 1000), objects, "shard-1") == CONTENTS["shard-1"]
    assert objects.fetched == ["shard-1"]


def test_the_longest_unused_copies_make_room(tmp_path: Path, objects: CountedObjects) -> None:
    directory = tmp_path / "copies"
    cache = ShardCache(directory, 300)
    for age, path in enumerate(["shard-0", "shard-1", "shard-2"]):
        read(cache, objects, path)
        copy = directory / f"{FileRecord.of(CONTENTS[path]).xxh3_128}.arrow"
        os.utime(copy, (age, age))
    read(cache, objects, "shard-0")  # used again: now the youngest
    read(cache, objects, "shard-3")
    objects.fetched.clear()
    for path in ("shard-0", "shard-2", "shard-3"):
        read(cache, objects, path)
    assert objects.fetched == []
    read(cache, objects, "shard-1")
    assert objects.fetched == ["shard-1"]
    assert sum(copy.stat().st_size for copy in directory.iterdir()) <= 300


def test_a_file_larger_than_the_bound_is_read_all_the_same(
    tmp_path: Path, objects: CountedObjects
) -> None:
    cache = ShardCache(tmp_path / "copies", 50)
    assert read(cache, objects, "shard-1") == CONTENTS["shard-1"]
    assert read(cache, objects, "shard-2") == CONTENTS["shard-2"]
    assert len(list((tmp_path / "copies").iterdir())) == 1


def test_a_copy_that_is_removed_stays_readable_where_it_is_open(
    tmp_path: Path, objects: CountedObjects
) -> None:
    cache = ShardCache(tmp_path / "copies", 100)
    with cache.open(objects, "shard-1", FileRecord.of(CONTENTS["shard-1"])) as file:
        read(cache, objects, "shard-2")
        assert file.read() == CONTENTS["shard-1"]


@pytest.mark.parametrize("damage", [b"", b"x" * 100, CONTENTS["shard-1"][:50]])
def test_a_damaged_copy_is_fetched_again(
    tmp_path: Path, objects: CountedObjects, damage: bytes
) -> None:
    directory = tmp_path / "copies"
    read(ShardCache(directory, 1000), objects, "shard-1")
    (copy,) = directory.iterdir()
    copy.write_bytes(damage)
    assert read(ShardCache(directory, 1000), objects, "shard-1") == CONTENTS["shard-1"]
    assert objects.fetched == ["shard-1"] * 2
    assert copy.read_bytes() == CONTENTS["shard-1"]


def test_a_damaged_object_is_no_copy(tmp_path: Path, objects: CountedObjects) -> None:
    (tmp_path / "remote" / "shard-1").write_bytes(b"x" * 100)
    cache = ShardCache(tmp_path / "copies", 1000)
    with pytest.raises(ShardCorruptError, match=r"shard-1 .*distill repair"):
        read(cache, objects, "shard-1")
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_missing_object_is_told_from_a_damaged_one(
    tmp_path: Path, objects: CountedObjects
) -> None:
    cache = ShardCache(tmp_path / "copies", 1000)
    with pytest.raises(FileNotFoundError):
        cache.open(objects, "shard-9", FileRecord.of(b"y"))
