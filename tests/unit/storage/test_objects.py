"""One small interface over every medium; here the local one (S3: tests/integration)."""

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
