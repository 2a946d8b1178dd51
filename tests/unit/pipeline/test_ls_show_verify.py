"""Looking at a store: what is there, where it came from, and whether it is whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.project import Project
from storage.keys import MassSpec
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

SPEC = make_spec()
Capture = pytest.CaptureFixture[str]
AsJson = Callable[..., Any]
Damage = Callable[[Path], None]


def shard(store: Path) -> Path:
    return min(store.rglob("*.labels.arrow"))


def spec_file(store: Path) -> Path:
    return store / "label_sets" / SPEC.key / "spec.json"


def add_other_set(store: Path) -> str:
    """One more label set, of one sample; returns its key."""
    spec = make_spec(k=4)
    LabelStore(str(store)).create(spec, {}).append([make_sample(0, spec)], {})
    return spec.key


# -- ls -------------------------------------------------------------------------------------------
def test_ls_lists_the_sizes_of_a_label_set(store: Path, tmp_path: Path, as_json: AsJson) -> None:
    found = as_json("ls", "--store", str(store), "--runs", str(tmp_path / "none"))
    (entry,) = found["label_sets"]
    assert entry["key"] == SPEC.key
    assert (entry["mode"], entry["kind"], entry["teacher"]) == ("generate", "top-8", "./a-teacher")
    # 3 * 5 + 2 * 4 tokens
    assert (entry["samples"], entry["tokens"], entry["commits"]) == (5, 23, 2)
    assert (entry["shards"], entry["partitions"]) == (2, 1)
    assert entry["bytes"] == sum(f.stat().st_size for f in store.rglob("shards/*.arrow"))
    assert found["runs"] == []


def test_ls_prints_a_beginning_of_the_key_that_show_takes(
    store: Path, as_json: AsJson, capsys: Capture
) -> None:
    assert main(["ls", "--store", str(store)]) == 0
    shown = capsys.readouterr().out
    assert SPEC.key[:12] in shown
    assert "2 in 1" in shown
    assert as_json("show", SPEC.key[:12], "--store", str(store))["label_set"] == SPEC.key


def test_ls_tells_the_mass_of_an_adaptive_set(store: Path, as_json: AsJson) -> None:
    spec = SPEC.model_copy(update={"kind": MassSpec(mass=0.999, cap=64)})
    LabelStore(str(store)).create(spec, {})
    entries = {e["key"]: e["kind"] for e in as_json("ls", "--store", str(store))["label_sets"]}
    assert entries == {SPEC.key: "top-8", spec.key: "99.9 % <= 64"}


@pytest.mark.parametrize("broken", ["spec.json", "commits/00000001.json"])
def test_ls_shows_a_damaged_set_with_its_error_beside_the_others(
    store: Path, as_json: AsJson, capsys: Capture, broken: str
) -> None:
    other = add_other_set(store)
    (store / "label_sets" / SPEC.key / broken).write_text("{}")
    entries = {e["key"]: e for e in as_json("ls", "--store", str(store))["label_sets"]}
    assert entries[other]["samples"] == 1
    assert broken in entries[SPEC.key]["error"]
    assert main(["ls", "--store", str(store)]) == 0
    shown = capsys.readouterr().out
    assert "damaged" in shown
    assert f"{SPEC.key}: {entries[SPEC.key]['error']}" in shown


def test_ls_of_a_store_that_is_not_there_yet_is_empty(tmp_path: Path, as_json: AsJson) -> None:
    found = as_json("ls", "--store", str(tmp_path / "none"), "--runs", str(tmp_path / "none"))
    assert (found["label_sets"], found["runs"]) == ([], [])


def test_ls_lists_run_folders(
    open_project: Callable[..., Project], tmp_path: Path, as_json: AsJson
) -> None:
    project = open_project()
    with project.running():
        project.write_json("students/soft-0123/student.json", {"name": "soft"})
    words = ["ls", "--store", project.store_uri, "--runs", str(tmp_path / "runs")]
    (run,) = as_json(*words)["runs"]
    assert run == {
        "name": "tiny",
        "directory": str(project.directory),
        "students": ["soft"],
        "report": None,
    }


# -- show -----------------------------------------------------------------------------------------
def test_show_explains_a_label_set_by_the_beginning_of_its_key(
    store: Path, tmp_path: Path, as_json: AsJson
) -> None:
    found = as_json("show", SPEC.key[:6], "--store", str(store), "--runs", str(tmp_path))
    assert found["label_set"] == SPEC.key
    assert found["generation_key"] == SPEC.generation.key
    assert found["spec"] == SPEC.model_dump(mode="json")
    totals = found["totals"]
    assert (totals["num_samples"], totals["num_shards"], totals["num_partitions"]) == (5, 2, 1)
    assert [(c["number"], c["samples"], c["shards"]) for c in found["commits"]] == [
        (1, 3, 1),
        (2, 2, 1),
    ]
    assert [c["provenance"]["host"] for c in found["commits"]] == ["h1", "h2"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], range(6, 26)), (["--commits", "2"], [24, 25]), (["--commits", "0"], [])],
    ids=["20 by default", "two", "none"],
)
def test_show_lists_the_last_commits(
    tmp_path: Path, as_json: AsJson, words: list[str], expected: list[int]
) -> None:
    label_set = LabelStore(str(tmp_path / "store"), create=True).create(SPEC, {})
    for number in range(25):
        label_set.append([make_sample(number, SPEC, num_tokens=1)], {})
    found = as_json("show", SPEC.key, "--store", str(tmp_path / "store"), *words)
    assert [commit["number"] for commit in found["commits"]] == list(expected)
    assert found["totals"]["num_commits"] == 25


def test_show_explains_a_run_by_its_name(
    open_project: Callable[..., Project], tmp_path: Path, as_json: AsJson
) -> None:
    project = open_project()
    with project.running():
        pass
    found = as_json("show", "tiny", "--runs", str(tmp_path / "runs"))
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
def test_a_whole_store_is_verified(store: Path, as_json: AsJson, capsys: Capture) -> None:
    found = as_json("verify", "--store", str(store))
    assert found == {"store": str(store), "label_sets": [SPEC.key], "problems": []}
    assert main(["verify", SPEC.key[:8], "--store", str(store)]) == 0
    assert "1 label sets verified, nothing is damaged" in capsys.readouterr().out


def test_the_bytes_that_were_verified_are_counted(store: Path, capsys: Capture) -> None:
    assert main(["verify", "--store", str(store)]) == 0
    num_kb = sum(f.stat().st_size for f in store.rglob("shards/*.arrow")) / 1000
    expected = f"verifying {SPEC.key[:12]}: {num_kb:.1f} kB/{num_kb:.1f} kB"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("how", ["flipped bit", "lost byte", "lost file"])
def test_damage_is_exit_code_two_and_names_file_and_loss(
    store: Path, as_json: AsJson, capsys: Capture, flip_a_bit: Damage, how: str
) -> None:
    file = shard(store)
    if how == "flipped bit":
        flip_a_bit(file)
    elif how == "lost byte":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    (problem,) = as_json("verify", "--store", str(store), code=2)["problems"]
    assert problem["what"] == "shard"
    assert problem["path"].endswith(file.name)
    assert problem["lost_samples"] in (2, 3)
    assert main(["verify", "--store", str(store)]) == 2
    error = capsys.readouterr().err
    assert f"error: 1 damaged files in {store}" in error
    assert problem["error"] in error
    assert f"{problem['lost_samples']} samples are lost" in error
    assert f"run `distill repair --store {store}`" in error


def test_all_damaged_files_are_found(store: Path, as_json: AsJson, flip_a_bit: Damage) -> None:
    for file in store.rglob("*.labels.arrow"):
        flip_a_bit(file)
    assert len(as_json("verify", "--store", str(store), code=2)["problems"]) == 2


@pytest.mark.parametrize("content", ["{}", None], ids=["damaged", "missing"])
def test_a_damaged_spec_does_not_hide_the_damage_of_another_set(
    store: Path, as_json: AsJson, flip_a_bit: Damage, content: str | None
) -> None:
    other = add_other_set(store)
    flip_a_bit(shard(store / "label_sets" / other))
    if content is None:
        spec_file(store).unlink()
    else:
        spec_file(store).write_text(content)
    found = as_json("verify", "--store", str(store), code=2)
    assert found["label_sets"] == sorted([SPEC.key, other])
    problems = {p["label_set"]: (p["what"], p["lost_samples"]) for p in found["problems"]}
    assert problems == {SPEC.key: ("spec", 0), other: ("shard", 1)}


def test_a_removed_set_is_no_damage(store: Path, as_json: AsJson) -> None:
    """Its spec is gone and its history stays."""
    assert main(["rm", SPEC.key, "--store", str(store), "--yes"]) == 0
    assert as_json("verify", "--store", str(store))["label_sets"] == []


def test_a_key_that_no_set_has_cannot_be_verified(store: Path, capsys: Capture) -> None:
    assert main(["verify", "zzz", "--store", str(store)]) == 2
    error = capsys.readouterr().err
    assert "no label set" in error
    assert SPEC.key in error


def test_a_store_that_does_not_exist_cannot_be_verified(tmp_path: Path, capsys: Capture) -> None:
    assert main(["verify", "--store", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
