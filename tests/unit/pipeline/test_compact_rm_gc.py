"""Tidying a store: fewer shards, fewer label sets, fewer files; never a sample less than asked."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.commands.garbage import duration
from storage.errors import ConfigError
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

SPEC = make_spec()
OTHER = make_spec(k=4)
Capture = pytest.CaptureFixture[str]
AsJson = Callable[..., Any]
Damage = Callable[[Path], None]


def add_other_set(store: Path) -> None:
    """One sample of 5 tokens."""
    LabelStore(str(store)).create(OTHER, {}).append([make_sample(0, OTHER)], {})


def shards(store: Path, key: str = SPEC.key) -> list[Path]:
    return sorted((store / "label_sets" / key / "shards").iterdir())


# -- compact --------------------------------------------------------------------------------------
def test_small_shards_become_one_and_hold_the_same_samples(store: Path, as_json: AsJson) -> None:
    keys = [make_sample(number, SPEC, num_tokens=1).key for number in range(5)]
    before = [s.response_ids_R.tolist() for s in LabelStore(str(store)).view(SPEC).read(keys)]
    (done,) = as_json("compact", SPEC.key[:6], "--store", str(store))["label_sets"]
    assert (done["label_set"], done["shards_before"], done["shards_after"]) == (SPEC.key, 2, 1)
    assert done["num_samples"] == 5
    after = [s.response_ids_R.tolist() for s in LabelStore(str(store)).view(SPEC).read(keys)]
    assert after == before
    assert LabelStore(str(store)).open(SPEC.key).totals().num_shards == 1


def test_compacting_says_what_became_of_the_shards_and_then_that_nothing_is_left(
    store: Path, capsys: Capture
) -> None:
    assert main(["compact", "--store", str(store)]) == 0
    assert "2 shards became 1" in capsys.readouterr().out
    assert main(["compact", "--store", str(store)]) == 0
    assert f"{SPEC.key[:12]}: nothing to compact" in capsys.readouterr().out


def test_a_damaged_set_does_not_keep_the_others_from_being_compacted(
    store: Path, as_json: AsJson, flip_a_bit: Damage
) -> None:
    add_other_set(store)
    other = LabelStore(str(store)).open(OTHER.key)
    other.append([make_sample(1, OTHER)], {})
    for file in shards(store):
        flip_a_bit(file)
    found = as_json("compact", "--store", str(store), code=2)
    assert [done["label_set"] for done in found["label_sets"]] == [OTHER.key]
    assert other.totals().num_shards == 1


def test_an_unknown_key_cannot_be_compacted(store: Path, capsys: Capture) -> None:
    assert main(["compact", "zzz", "--store", str(store)]) == 2
    assert "match 'zzz'" in capsys.readouterr().err


# -- rm -------------------------------------------------------------------------------------------
def test_removed_sets_are_gone_and_their_files_stay(store: Path, as_json: AsJson) -> None:
    add_other_set(store)
    files = shards(store)
    found = as_json("rm", SPEC.key[:6], OTHER.key, "--store", str(store), "--yes")
    assert found == {"store": str(store), "removed": [SPEC.key, OTHER.key]}
    assert as_json("ls", "--store", str(store))["label_sets"] == []
    assert shards(store) == files


def test_rm_shows_what_would_go_and_does_nothing_without_yes(store: Path, capsys: Capture) -> None:
    assert main(["rm", SPEC.key, "--store", str(store)]) == 2
    captured = capsys.readouterr()
    for shown in (SPEC.key[:12], "top-8", "5", "23", "./a-teacher"):
        assert shown in captured.out
    assert "add --yes" in captured.err
    assert LabelStore(str(store)).keys() == [SPEC.key]


def test_rm_says_that_gc_frees_the_bytes(store: Path, capsys: Capture) -> None:
    assert main(["rm", SPEC.key, "--store", str(store), "--yes"]) == 0
    assert "`distill gc` frees the bytes" in capsys.readouterr().out


def test_one_unknown_key_keeps_rm_from_removing_any(store: Path, capsys: Capture) -> None:
    assert main(["rm", SPEC.key, "zzz", "--store", str(store), "--yes"]) == 2
    assert "match 'zzz'" in capsys.readouterr().err
    assert LabelStore(str(store)).keys() == [SPEC.key]


# -- gc -------------------------------------------------------------------------------------------
def gc(store: Path, *words: str) -> tuple[str, ...]:
    return ("gc", "--store", str(store), *words)


def test_gc_of_a_store_in_use_finds_nothing(store: Path, as_json: AsJson, capsys: Capture) -> None:
    found = as_json(*gc(store, "--grace", "0s"))
    (entry,) = found["label_sets"]
    assert (entry["label_set"], entry["files"], entry["kept_for_now"]) == (SPEC.key, 0, 0)
    assert main([*gc(store, "--grace", "0s")]) == 0
    assert "0 B freed" in capsys.readouterr().out


def test_gc_deletes_what_compact_left(store: Path, as_json: AsJson) -> None:
    old = shards(store)
    assert main(["compact", "--store", str(store)]) == 0
    expected = sum(file.stat().st_size for file in old)
    found = as_json(*gc(store, "--grace", "0s", "--yes"))
    assert [entry["files"] for entry in found["label_sets"]] == [len(old)]
    assert found["freed_bytes"] == expected
    assert set(shards(store)).isdisjoint(old)
    assert as_json("verify", "--store", str(store))["problems"] == []


def test_gc_keeps_everything_within_the_grace_period(store: Path, as_json: AsJson) -> None:
    before = shards(store)
    assert main(["compact", "--store", str(store)]) == 0
    (entry,) = as_json(*gc(store, "--yes"))["label_sets"]  # 24 h by default
    assert (entry["files"], entry["kept_for_now"]) == (0, len(before))
    assert set(shards(store)).issuperset(before)


def test_gc_deletes_the_files_of_a_removed_set(store: Path, as_json: AsJson) -> None:
    assert main(["rm", SPEC.key, "--store", str(store), "--yes"]) == 0
    assert as_json(*gc(store, "--grace", "0s", "--yes"))["freed_bytes"] > 0
    assert shards(store) == []


def test_a_dry_run_shows_and_deletes_nothing(store: Path, as_json: AsJson, capsys: Capture) -> None:
    assert main(["rm", SPEC.key, "--store", str(store), "--yes"]) == 0
    before = shards(store)
    found = as_json(*gc(store, "--grace", "0s", "--dry-run"))
    assert found["label_sets"][0]["files"] == len(before)
    assert found["freed_bytes"] == 0
    assert main([*gc(store, "--grace", "0s", "--dry-run")]) == 0
    assert "nothing was deleted" in capsys.readouterr().out
    assert shards(store) == before


def test_gc_deletes_nothing_without_yes(store: Path, capsys: Capture) -> None:
    assert main(["rm", SPEC.key, "--store", str(store), "--yes"]) == 0
    before = shards(store)
    assert main([*gc(store, "--grace", "0s")]) == 2
    assert "add --yes" in capsys.readouterr().err
    assert shards(store) == before


def test_a_set_whose_history_is_damaged_is_left_alone(
    store: Path, as_json: AsJson, flip_a_bit: Damage
) -> None:
    add_other_set(store)
    assert main(["rm", OTHER.key, "--store", str(store), "--yes"]) == 0
    flip_a_bit(store / "label_sets" / SPEC.key / "commits" / "00000001.json")
    before = shards(store)
    found = as_json(*gc(store, "--grace", "0s", "--yes"), code=2)
    assert [entry["label_set"] for entry in found["label_sets"]] == [OTHER.key]
    assert shards(store, OTHER.key) == []
    assert shards(store) == before


@pytest.mark.parametrize(
    ("text", "hours"), [("0s", 0), ("90s", 0.025), ("30m", 0.5), ("24h", 24), ("7d", 168)]
)
def test_a_grace_period_has_a_unit(text: str, hours: float) -> None:
    assert duration(text) == datetime.timedelta(hours=hours)


@pytest.mark.parametrize("text", ["24", "h", "-1h", "1.5h", "1w", "", "1h30m", "9999999999d"])
def test_anything_else_is_no_grace_period(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--grace .* such as 24h"):
        duration(text)
