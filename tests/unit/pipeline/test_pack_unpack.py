"""A label set travels as one archive, through a file or a pipe."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

SPEC = make_spec()
Capture = pytest.CaptureFixture[str]
BinaryCapture = pytest.CaptureFixture[bytes]
AsJson = Callable[..., Any]


class Stdin(io.TextIOWrapper):
    """Standard input that holds these bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))


def test_a_packed_set_is_the_same_in_another_store(
    store: Path, tmp_path: Path, as_json: AsJson
) -> None:
    archive = tmp_path / "labels.tar.zst"
    packed = as_json("pack", SPEC.key[:6], str(archive), "--store", str(store), "--licence", "MIT")
    assert packed == {
        "target": str(archive),
        "key": SPEC.key,
        "num_samples": 5,
        "num_tokens": 23,  # 3 * 5 + 2 * 4
        "num_bytes": archive.stat().st_size,
    }
    other = tmp_path / "other"
    unpacked = as_json("unpack", str(archive), "--store", str(other))
    assert unpacked == {"store": str(other), "key": SPEC.key, "num_samples": 5, "num_new": 5}
    keys = [make_sample(number, SPEC, num_tokens=1).key for number in range(5)]
    one, copy = (list(LabelStore(str(s)).open(SPEC.key).read(keys)) for s in (store, other))
    assert [s.response_ids_R.tolist() for s in one] == [s.response_ids_R.tolist() for s in copy]


def test_unpacking_twice_adds_nothing(store: Path, tmp_path: Path, capsys: Capture) -> None:
    archive = tmp_path / "labels.tar.zst"
    assert main(["pack", SPEC.key, str(archive), "--store", str(store)]) == 0
    assert f"5 samples with 23 tokens of label set {SPEC.key}" in capsys.readouterr().out
    assert main(["unpack", str(archive), "--store", str(store)]) == 0
    assert f"0 of 5 samples are new in label set {SPEC.key}" in capsys.readouterr().out


def test_through_a_pipe_stdout_holds_the_archive_alone(
    store: Path,
    tmp_path: Path,
    capfdbinary: BinaryCapture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["pack", SPEC.key, "-", "--store", str(store)]) == 0
    captured = capfdbinary.readouterr()
    assert b"5 samples with 23 tokens" in captured.err
    monkeypatch.setattr(sys, "stdin", Stdin(captured.out))
    other = tmp_path / "other"
    assert main(["unpack", "-", "--store", str(other)]) == 0
    assert LabelStore(str(other)).open(SPEC.key).totals().num_samples == 5


def test_an_archive_and_a_document_do_not_share_stdout(store: Path, capsys: Capture) -> None:
    assert main(["pack", SPEC.key, "-", "--store", str(store), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "leave out --json" in captured.err


def test_an_archive_is_not_written_to_a_terminal(
    store: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["pack", SPEC.key, "-", "--store", str(store)]) == 2
    assert "stdout is a terminal" in capsys.readouterr().err


def test_an_unknown_key_cannot_be_packed(store: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "labels.tar.zst"
    assert main(["pack", "zzz", str(target), "--store", str(store)]) == 2
    assert "match 'zzz'" in capsys.readouterr().err
    assert not target.exists()


def test_what_is_no_archive_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    store = str(tmp_path / "store")
    assert main(["unpack", str(tmp_path / "notes.txt"), "--store", store]) == 2
    assert "error: " in capsys.readouterr().err
    assert LabelStore(store).keys() == []
