"""Local files appear whole or not at all."""

import os
from pathlib import Path

import pytest

from storage.files import create_durably, publish_directory, write_atomically


def test_a_file_is_created_with_its_directories(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b.json", b"{}")
    assert (tmp_path / "a" / "b.json").read_bytes() == b"{}"


def test_a_file_is_replaced_and_nothing_else_remains(tmp_path: Path) -> None:
    write_atomically(tmp_path / "b.json", b"old")
    write_atomically(tmp_path / "b.json", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"b.json": b"new"}


def test_a_write_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    in_the_way = tmp_path / "b.json"
    in_the_way.mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(in_the_way, b"new")
    assert list(tmp_path.iterdir()) == [in_the_way]


def test_a_directory_is_published_under_its_final_name(tmp_path: Path) -> None:
    finished = tmp_path / "tmp"
    (finished / "deep").mkdir(parents=True)
    (finished / "deep" / "file").write_text("content")
    publish_directory(finished, tmp_path / "runs" / "one")
    assert (tmp_path / "runs" / "one" / "deep" / "file").read_text() == "content"
    assert not finished.exists()


def test_the_first_published_directory_stays(tmp_path: Path) -> None:
    for number in ("first", "second"):
        finished = tmp_path / f"tmp-{number}"
        finished.mkdir()
        (finished / "file").write_text(number)
        publish_directory(finished, tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_file_in_the_place_of_a_directory_is_an_error(tmp_path: Path) -> None:
    finished = tmp_path / "tmp"
    finished.mkdir()
    (tmp_path / "final").write_text("not a directory")
    with pytest.raises(NotADirectoryError):
        publish_directory(finished, tmp_path / "final")
    assert finished.is_dir()


def test_a_file_is_created_once_with_its_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c"
    assert create_durably(path, b"first") is True
    assert create_durably(path, b"second") is False
    assert path.read_bytes() == b"first"
    assert [found.name for found in path.parent.iterdir()] == ["c"]


def test_a_file_that_cannot_be_flushed_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        create_durably(tmp_path / "a", b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_staged_file_that_was_collected_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection without grace takes what is being written for a leftover of a crash."""
    link, collected = os.link, []

    def collect_once(staged: Path, path: Path) -> None:
        if not collected:
            collected.append(staged)
            staged.unlink()
        link(staged, path)

    monkeypatch.setattr(os, "link", collect_once)
    assert create_durably(tmp_path / "a", b"data") is True
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"data"]


def test_a_staged_file_that_always_disappears_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", lambda staged, path: (tmp_path / "gone").stat())
    with pytest.raises(FileNotFoundError):
        create_durably(tmp_path / "a", b"data")
    assert list(tmp_path.iterdir()) == []
