"""Damage is taken out of service, and only what was lost is asked for again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

SPEC = make_spec()
KEYS = [make_sample(number, SPEC, num_tokens=1).key for number in range(5)]
"""Sample keys of the store: of the first commit, then of the second."""
Capture = pytest.CaptureFixture[str]
AsJson = Callable[..., Any]
Damage = Callable[[Path], None]


def folder(store: Path) -> Path:
    return store / "label_sets" / SPEC.key


def shard_of_commit(store: Path, number: int) -> Path:
    record = LabelStore(str(store)).open(SPEC.key).log.single(number)
    assert record is not None
    return folder(store) / "shards" / f"{record.shards[0].name}.labels.arrow"


def contains(store: Path) -> list[bool]:
    flags: list[bool] = LabelStore(str(store)).view(SPEC).contains(KEYS).tolist()
    return flags


def test_a_whole_store_needs_no_repair(store: Path, as_json: AsJson, capsys: Capture) -> None:
    done = as_json("repair", "--store", str(store))
    assert done == {"store": str(store), "repaired": [], "deleted_selections": []}
    assert main(["repair", "--store", str(store)]) == 0
    assert "nothing is damaged" in capsys.readouterr().out


def test_a_damaged_shard_loses_its_samples_and_no_others(
    store: Path, as_json: AsJson, flip_a_bit: Damage
) -> None:
    file = shard_of_commit(store, 2)
    flip_a_bit(file)
    assert as_json("verify", "--store", str(store), code=2)["problems"]
    (done,) = as_json("repair", SPEC.key[:6], "--store", str(store), "--yes")["repaired"]
    assert done["label_set"] == SPEC.key
    assert done["quarantined"] == [file.name.partition(".")[0]]
    assert done["lost_samples"] == 2
    assert contains(store) == [True, True, True, False, False]
    assert as_json("verify", "--store", str(store))["problems"] == []


def test_samples_that_were_lost_can_be_stored_again(store: Path, flip_a_bit: Damage) -> None:
    flip_a_bit(shard_of_commit(store, 2))
    assert main(["repair", "--store", str(store), "--yes"]) == 0
    label_set = LabelStore(str(store)).open(SPEC.key)
    label_set.append([make_sample(n, SPEC, num_tokens=4) for n in (3, 4)], {})
    assert contains(store) == [True] * 5
    assert label_set.totals().num_samples == 5


def test_repair_says_what_it_did_and_what_comes_next(
    store: Path, capsys: Capture, flip_a_bit: Damage
) -> None:
    file = shard_of_commit(store, 1)
    flip_a_bit(file)
    assert main(["repair", "--store", str(store), "--yes"]) == 0
    shown = capsys.readouterr().out
    assert "take it out of" in shown
    assert f"out of service: {file.name.partition('.')[0]}" in shown
    assert "3 samples are lost; the next `distill label` asks for exactly those" in shown


def test_without_a_terminal_and_without_yes_nothing_is_done(
    store: Path, capsys: Capture, flip_a_bit: Damage
) -> None:
    flip_a_bit(shard_of_commit(store, 1))
    before = sorted(store.rglob("*"))
    assert main(["repair", "--store", str(store)]) == 2
    captured = capsys.readouterr()
    assert "add --yes" in captured.err
    assert "3 samples are lost" in " ".join(captured.out.split())
    assert sorted(store.rglob("*")) == before


@pytest.mark.parametrize("content", ["{}", None], ids=["damaged", "missing"])
def test_a_spec_is_written_anew_from_a_shard(
    store: Path, as_json: AsJson, content: str | None
) -> None:
    if content is None:
        (folder(store) / "spec.json").unlink()
    else:
        (folder(store) / "spec.json").write_text(content)
    (done,) = as_json("repair", "--store", str(store), "--yes")["repaired"]
    assert done["spec_restored"]
    assert contains(store) == [True] * 5


def test_behind_a_damaged_spec_a_damaged_shard_is_repaired_too(
    store: Path, as_json: AsJson, flip_a_bit: Damage
) -> None:
    flip_a_bit(shard_of_commit(store, 1))
    (folder(store) / "spec.json").write_text("{}")
    (done,) = as_json("repair", "--store", str(store), "--yes")["repaired"]
    assert (done["spec_restored"], done["lost_samples"]) == (True, 3)
    assert contains(store) == [False, False, False, True, True]


def test_an_index_is_made_anew_without_a_loss(
    store: Path, as_json: AsJson, flip_a_bit: Damage
) -> None:
    flip_a_bit(next((folder(store) / "index").iterdir()))
    (done,) = as_json("repair", "--store", str(store), "--yes")["repaired"]
    assert (len(done["reindexed"]), done["lost_samples"]) == (1, 0)
    assert contains(store) == [True] * 5


def test_a_set_that_cannot_be_repaired_does_not_keep_the_others_from_it(
    store: Path, as_json: AsJson, capsys: Capture, flip_a_bit: Damage
) -> None:
    flip_a_bit(shard_of_commit(store, 1))
    hopeless = make_spec(k=4)
    LabelStore(str(store)).create(hopeless, {})
    (store / "label_sets" / hopeless.key / "spec.json").write_text("{}")
    found = as_json("repair", "--store", str(store), "--yes", code=2)
    assert [done["label_set"] for done in found["repaired"]] == [SPEC.key]
    assert main(["repair", "--store", str(store), "--yes"]) == 2
    error = capsys.readouterr().err
    assert "1 label sets failed" in error
    assert "no shard has a copy" in error


def test_an_unknown_key_is_refused(store: Path, capsys: Capture) -> None:
    assert main(["repair", "zzz", "--store", str(store), "--yes"]) == 2
    assert "match 'zzz'" in capsys.readouterr().err
