"""One small interface over every medium; here the local one (S3: tests/integration)."""

import datetime
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.errors import LabelStoreError
from storage.objects import Objects


def test_an_object_is_created_once_and_never_replaced(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    assert objects.create("a/b.json", b"first") is True
    assert objects.create("a/b.json", b"second") is False
    assert objects.get("a/b.json") == b"first"


def test_a_path_and_its_file_uri_are_one_store(tmp_path: Path) -> None:
    Objects(str(tmp_path)).create("a", b"x")
    assert Objects(f"file://{tmp_path}").get("a") == b"x"


def test_paths_are_sorted_and_lie_below_the_prefix(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    for path in ("a/2", "a/1", "a/c/3", "ab/4"):
        objects.create(path, b"")
    assert list(objects.paths("a")) == ["a/1", "a/2", "a/c/3"]


def test_directories_are_named_without_their_prefix(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    for path in ("sets/b/x", "sets/a/x/y", "sets/file", "other/x"):
        objects.create(path, b"")
    assert objects.directories("sets") == ["a", "b"]


def test_what_a_killed_writer_left_is_not_listed(tmp_path: Path) -> None:
    """The local medium writes to ``name#1`` first and links that to ``name``."""
    objects = Objects(str(tmp_path))
    objects.create("a/1", b"")
    (tmp_path / "a" / "2#1").write_bytes(b"half")
    assert list(objects.paths("a")) == ["a/1"]
    assert objects.create("a/2", b"whole") is True


def test_a_missing_local_store_reads_as_empty(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path / "nowhere"))
    assert not objects.exists
    assert list(objects.paths("label_sets")) == []
    assert objects.directories("label_sets") == []
    with pytest.raises(FileNotFoundError, match=r"spec\.json does not exist"):
        objects.get("spec.json")
    assert not (tmp_path / "nowhere").exists()


def test_writing_to_a_missing_local_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelStoreError, match="does not exist"):
        Objects(str(tmp_path / "nowhere")).create("a", b"")


def test_a_missing_local_store_is_made_on_request(tmp_path: Path) -> None:
    assert Objects(str(tmp_path / "deep" / "store"), create=True).create("a", b"")


def test_a_missing_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a/b\.json does not exist"):
        Objects(str(tmp_path)).get("a/b.json")


@pytest.mark.parametrize("uri", ["http://host/labels", "hdfs://labels", "S3://labels"])
def test_an_unknown_scheme_lists_the_known_ones(uri: str) -> None:
    with pytest.raises(LabelStoreError, match="unknown scheme; use a local path or one of s3://"):
        Objects(uri)


def test_a_remote_uri_without_a_bucket_is_refused() -> None:
    with pytest.raises(LabelStoreError, match="cannot open store 's3://'"):
        Objects("s3://")


def test_a_file_in_the_place_of_the_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(LabelStoreError, match="cannot create store"):
        Objects(str(tmp_path / "store"), create=True)


def test_a_directory_that_cannot_be_written_says_that_the_rest_is_intact(tmp_path: Path) -> None:
    (tmp_path / "label_sets").write_text("a file stands where a directory should")
    with pytest.raises(
        LabelStoreError, match=r"cannot write .*committed before is intact"
    ) as error:
        Objects(str(tmp_path)).create("label_sets/a/spec.json", b"")
    assert "\n" not in str(error.value)


# -- what the format needs of a medium -------------------------------------------------------------
def test_paths_behind_a_given_one_leave_it_out(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    for path in ("a/1", "a/2", "a/3"):
        objects.create(path, b"")
    assert list(objects.paths("a", after="a/2")) == ["a/3"]
    assert list(objects.paths("a", after="a/1x")) == ["a/2", "a/3"]


def test_entries_tell_sizes_and_when_objects_were_made(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    objects.create("a/1", b"12345")
    os.utime(tmp_path / "a" / "1", (1000, 1000))
    made = datetime.datetime(1970, 1, 1, 0, 16, 40, tzinfo=datetime.UTC)  # 1000 s
    assert list(objects.entries("a")) == [("a/1", 5, made)]


def test_the_time_is_that_of_the_medium_and_leaves_no_object(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    before = objects.now()
    objects.create("a", b"")
    (_, _, made), *_ = objects.entries("")
    assert before <= made <= objects.now()
    assert list(objects.paths("")) == ["a"]


def test_an_object_is_opened_where_it_lies(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    objects.create("a/1", b"12345")
    file, size = objects.open("a/1")
    with file:
        assert size == 5
        assert file.read_at(2, 3) == b"45"
    with pytest.raises(FileNotFoundError, match="a/2 does not exist"):
        objects.open("a/2")


def test_deleting_twice_is_no_error(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    objects.create("a/1", b"")
    objects.delete("a/1")
    objects.delete("a/1")
    assert list(objects.paths("")) == []


def test_an_upload_replaces_whole_objects(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path / "store"), create=True)
    for content in (b"first", b"second"):
        (tmp_path / "file").write_bytes(content)
        objects.upload("a/archive", tmp_path / "file")
    assert objects.get("a/archive") == b"second"


def test_a_retry_after_a_lost_answer_finds_its_own_object(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    objects.create("a", b"ours")
    objects.create_own("a", b"ours")
    with pytest.raises(LabelStoreError, match="a exists already with another content"):
        objects.create_own("a", b"theirs")


def test_unfinished_writes_are_found_with_their_age(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    objects.create("sets/a/x", b"")
    half = tmp_path / "sets" / "a" / "y#123"
    half.write_bytes(b"half")
    os.utime(half, (1000, 1000))
    (tmp_path / "other#1").write_bytes(b"")
    ((path, size, made),) = objects.unfinished("sets")
    assert (path, size, made.timestamp()) == ("sets/a/y#123", 4, 1000)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda objects: objects.open("folder"), "cannot read .*/folder"),
        (lambda objects: objects.delete("folder"), "cannot remove .*/folder"),
    ],
    ids=["open", "delete"],
)
def test_a_folder_in_the_place_of_an_object_is_named(
    tmp_path: Path, act: Callable[[Objects], object], message: str
) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(LabelStoreError, match=message) as error:
        act(Objects(str(tmp_path)))
    assert "\n" not in str(error.value)
