"""Looking at a store: what is there, where it came from, and whether it is whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.project import Project
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

SPEC = make_spec()
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two commits of a made-up teacher: three samples of 5 tokens, then two of 4."""
    root = tmp_path / "store"
    label_set = LabelStore(str(root), create=True).create(SPEC, {"teacher": "./a-teacher"})
    label_set.append([make_sample(number, SPEC) for number in range(3)], {"host": "h1"})
    more = [make_sample(number, SPEC, num_tokens=4) for number in (3, 4)]
    label_set.append(more, {"host": "h2"})
    return root


def as_json(words: list[str], capsys: Capture, *, code: int = 0) -> Any:
    assert main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def shard(store: Path) -> Path:
    return min(store.rglob("*.labels.arrow"))


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# -- ls -------------------------------------------------------------------------------------------
def test_ls_lists_the_sizes_of_a_label_set(store: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["ls", "--store", str(store), "--runs", str(tmp_path / "none")]
    found = as_json(words, capsys)
    (entry,) = found["label_sets"]
    assert entry["key"] == SPEC.key
    assert (entry["mode"], entry["k"], entry["teacher"]) == ("generate", 8, "./a-teacher")
    # 3 * 5 + 2 * 4 tokens
    assert (entry["samples"], entry["tokens"], entry["commits"]) == (5, 23, 2)
    assert entry["bytes"] == sum(f.stat().st_size for f in store.rglob("*.arrow"))
    assert found["runs"] == []


def test_ls_prints_a_beginning_of_the_key_that_show_takes(store: Path, capsys: Capture) -> None:
    assert main(["ls", "--store", str(store)]) == 0
    assert SPEC.key[:12] in capsys.readouterr().out
    assert as_json(["show", SPEC.key[:12], "--store", str(store)], capsys)["label_set"] == SPEC.key


def test_ls_of_a_store_that_is_not_there_yet_is_empty(tmp_path: Path, capsys: Capture) -> None:
    words = ["ls", "--store", str(tmp_path / "none"), "--runs", str(tmp_path / "none")]
    found = as_json(words, capsys)
    assert (found["label_sets"], found["runs"]) == ([], [])


def test_ls_lists_run_folders(
    open_project: Callable[..., Project], tmp_path: Path, capsys: Capture
) -> None:
    project = open_project()
    with project.running():
        project.write_json("students/soft-0123/student.json", {"name": "soft"})
    words = ["ls", "--store", project.store_uri, "--runs", str(tmp_path / "runs")]
    (run,) = as_json(words, capsys)["runs"]
    assert run == {
        "name": "tiny",
        "directory": str(project.directory),
        "students": ["soft"],
        "report": None,
    }


# -- show -----------------------------------------------------------------------------------------
def test_show_explains_a_label_set_by_the_beginning_of_its_key(
    store: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["show", SPEC.key[:6], "--store", str(store), "--runs", str(tmp_path)]
    found = as_json(words, capsys)
    assert found["label_set"] == SPEC.key
    assert found["generation_key"] == SPEC.generation.key
    assert found["spec"] == SPEC.model_dump(mode="json")
    assert found["totals"]["num_samples"] == 5
    assert [(c["number"], c["samples"]) for c in found["commits"]] == [(1, 3), (2, 2)]
    assert [c["provenance"]["host"] for c in found["commits"]] == ["h1", "h2"]


def test_show_explains_a_run_by_its_name(
    open_project: Callable[..., Project], tmp_path: Path, capsys: Capture
) -> None:
    project = open_project()
    with project.running():
        pass
    found = as_json(["show", "tiny", "--runs", str(tmp_path / "runs")], capsys)
    assert found["config"]["name"] == "tiny"
    assert found["provenance"]["command"]
    assert found["students"] == []


def test_show_of_an_unknown_name_lists_what_is_there(
    store: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["show", "zzz", "--store", str(store), "--runs", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "no label set" in error
    assert SPEC.key in error


def test_show_prints_for_people(store: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["show", SPEC.key, "--store", str(store), "--runs", str(tmp_path)]) == 0
    assert SPEC.key in capsys.readouterr().out


# -- verify ---------------------------------------------------------------------------------------
def test_a_whole_store_is_verified(store: Path, capsys: Capture) -> None:
    found = as_json(["verify", "--store", str(store)], capsys)
    assert found == {"store": str(store), "label_sets": [SPEC.key], "problems": []}
    assert main(["verify", SPEC.key[:8], "--store", str(store)]) == 0
    assert "1 label sets verified, nothing is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (flip_a_bit, "has the checksum"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "was truncated or replaced"),
        (lambda file: file.unlink(), "was committed and is missing"),
    ],
    ids=["flipped bit", "lost byte", "lost file"],
)
def test_damage_is_exit_code_two_and_names_file_and_loss(
    store: Path, capsys: Capture, damage: Callable[[Path], None], expected: str
) -> None:
    file = shard(store)
    damage(file)
    assert main(["verify", "--store", str(store), "--json"]) == 2
    captured = capsys.readouterr()
    (problem,) = json.loads(captured.out)["problems"]
    assert problem["path"].endswith(file.name)
    assert problem["lost_samples"] in (2, 3)
    assert expected in problem["error"]
    assert "1 damaged files" in captured.err
    assert expected in captured.err


def test_all_damaged_files_are_found(store: Path, capsys: Capture) -> None:
    for file in store.rglob("*.labels.arrow"):
        flip_a_bit(file)
    found = as_json(["verify", "--store", str(store)], capsys, code=2)
    assert len(found["problems"]) == 2


def test_a_store_that_does_not_exist_cannot_be_verified(tmp_path: Path, capsys: Capture) -> None:
    assert main(["verify", "--store", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
