"""Only what nothing serves is deleted, after its time, and never under somebody's feet."""

import datetime
import os
from pathlib import Path

import pytest

from storage.compact import compact
from storage.errors import LabelStoreError
from storage.garbage import collect, drop, find_garbage
from storage.objects import Objects
from storage.repair import repair
from storage.testing import make_sample, make_spec
from storage.writer import publish, write_shard

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC) for number in range(10)]
KEYS = [sample.key for sample in SAMPLES]
HOUR = datetime.timedelta(hours=1)
AT_ONCE = datetime.timedelta(0)


def find(bench, grace: datetime.timedelta = AT_ONCE):
    return find_garbage(Objects(bench.uri), SPEC.key, grace)


def names(paths) -> set[str]:
    return {Path(path).name.partition(".")[0] for path in paths}


def age(paths: list[Path], hours: float) -> None:
    """Files of the local medium are as old as their modification."""
    for path in paths:
        made = path.stat().st_mtime - 3600 * hours
        os.utime(path, (made, made))


# -- what is garbage -------------------------------------------------------------------------------
def test_nothing_that_is_served_is_garbage(bench) -> None:
    bench.filled(SAMPLES[:5], SAMPLES[5:])
    age([path for path in bench.root.rglob("*") if path.is_file()], 1000)
    garbage = find(bench)
    assert (garbage.paths, garbage.kept_for_now, garbage.num_bytes) == ({}, 0, 0)


def test_superseded_shards_are_garbage_with_their_size(bench, gc) -> None:
    label_set = bench.filled(SAMPLES[:5], SAMPLES[5:])
    old = [*label_set.files(), *label_set.files("samples")]
    size = sum((bench.root / path).stat().st_size for path in old)
    compact(label_set, {})
    garbage = find(bench)
    assert set(garbage.paths) == set(old)
    assert garbage.num_bytes == size
    assert gc(bench) == sorted(old)
    assert not any((bench.root / path).exists() for path in old)
    bench.assert_serves(SAMPLES)
    assert find(bench).paths == {}


def test_indexes_of_merged_records_are_garbage(bench, gc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.log.MERGE_FACTOR", 2)
    label_set = bench.filled(*([sample] for sample in SAMPLES[:5]))
    needed = {name for record in label_set.log.walk(1) for name in record.index_names}
    assert len(needed) == 3  # table and index of 1-4, index of 5
    everything = names(bench.files("index/*"))
    assert names(gc(bench)) == everything - needed
    bench.assert_serves(SAMPLES[:5], SAMPLES)


def test_leftovers_of_dead_writers_are_garbage(bench, gc) -> None:
    bench.filled(SAMPLES[:5])
    with pytest.raises(bench.killed):
        bench.dying(3).append(SAMPLES[5:], {})  # two files and the index, then the record
    assert len(gc(bench)) == 3
    bench.assert_serves(SAMPLES[:5], SAMPLES)
    assert len(bench.files("shards/*")) == 2


def test_unfinished_writes_are_garbage(bench, gc) -> None:
    bench.filled(SAMPLES[:5])
    half = bench.folder() / "shards" / "x.labels.arrow#123"
    half.write_bytes(b"half")
    age([half], 1)
    (path,) = gc(bench)
    assert path.endswith("/shards/x.labels.arrow#123")
    assert not half.exists()
    assert len(bench.files("commits/*")) == 1  # nobody could have committed it: not announced
    bench.assert_serves(SAMPLES[:5])


# -- when it goes ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("hours", "count"), [(0.5, 0), (1.5, 4)])
def test_superseded_files_stay_for_the_grace_period(bench, hours: float, count: int) -> None:
    """It counts from the record that superseded them, however old the files are."""
    label_set = bench.filled(SAMPLES[:5], SAMPLES[5:])
    age(bench.files("shards/*"), 1000)
    compact(label_set, {})
    age([bench.files("commits/*")[-1]], hours)
    garbage = find(bench, HOUR)
    assert len(garbage.paths) == count
    assert garbage.kept_for_now == 4 - count


@pytest.mark.parametrize(("hours", "count"), [(0.5, 0), (1.5, 4)])
def test_leftovers_stay_for_the_grace_period(bench, hours: float, count: int) -> None:
    bench.filled(SAMPLES[:5])
    with pytest.raises(bench.killed):
        bench.dying(3).append(SAMPLES[5:], {})
    (bench.folder() / "shards" / "x#1").write_bytes(b"")
    served = {*bench.fresh().files(), *bench.fresh().files("samples")}
    age([p for p in bench.files("shards/*") if str(p.relative_to(bench.root)) not in served], hours)
    age(bench.files("index/*"), hours)
    assert len(find(bench, HOUR).paths) == count


@pytest.mark.parametrize(("hours", "count"), [(0.5, 0), (1.5, 2)])
def test_merged_indexes_stay_for_the_grace_period(
    bench, monkeypatch: pytest.MonkeyPatch, hours: float, count: int
) -> None:
    monkeypatch.setattr("storage.log.MERGE_FACTOR", 2)
    bench.filled(SAMPLES[:5], SAMPLES[5:])
    age(bench.files("index/*"), 1000)
    age(bench.files("merged/*"), hours)
    assert len(find(bench, HOUR).paths) == count


def test_indexes_of_records_that_were_merged_twice_stay_for_the_grace_period(
    bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1-2 and 3-4 were summed up in 1-4 just now; the indexes themselves are old."""
    monkeypatch.setattr("storage.log.MERGE_FACTOR", 2)
    bench.filled(*([sample] for sample in SAMPLES[:4]))
    age(bench.files("index/*"), 1000)
    age([path for path in bench.files("merged/*") if path.stem != "00000001-00000004"], 1000)
    old = {
        name for ends in ((1, 2), (3, 4)) for name in bench.fresh().log.merged(*ends).index_names
    }
    assert not old & names(find(bench, HOUR).paths)


def test_the_clock_is_that_of_the_store(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's clock is a day ahead of this machine's, which nobody asks."""
    label_set = bench.filled(SAMPLES[:5], SAMPLES[5:])
    compact(label_set, {})
    day = datetime.timedelta(days=1)
    now = Objects.now
    monkeypatch.setattr(Objects, "now", lambda self: now(self) + day)
    assert len(find(bench, HOUR).paths) == 4


# -- who is protected ------------------------------------------------------------------------------
def test_what_is_about_to_go_is_announced_first(bench, gc) -> None:
    label_set = bench.filled(SAMPLES[:5], SAMPLES[5:])
    old = {shard.name for shard in label_set.index.live_shards}
    compact(label_set, {})
    gc(bench)
    last = list(bench.fresh().log.singles())[-1]
    assert set(last.deleted) == old
    assert bench.fresh().totals().num_commits == last.last


def test_a_writer_that_was_slow_writes_anew_what_was_collected(bench, gc) -> None:
    bench.filled(SAMPLES[:5])
    slow = bench.raced(lambda: gc(bench))
    assert slow.append(SAMPLES[5:], {}) is not None
    bench.assert_serves(SAMPLES)


def test_what_is_committed_meanwhile_is_not_deleted(bench) -> None:
    """The shard is found as a leftover; its writer commits it before it is announced."""
    label_set = bench.filled(SAMPLES[:5])
    shard = write_shard(label_set, SAMPLES[5:])
    garbage = find(bench)
    assert shard.record.name in names(garbage.paths)
    assert publish(label_set, [shard], provenance={}) is not None
    collect(label_set.objects, garbage, {})
    bench.assert_serves(SAMPLES)


def test_a_commit_between_search_and_announcement_wins_the_race(bench) -> None:
    """As above, but the collector has read the history already."""
    other = bench.filled(SAMPLES[:5])
    shard = write_shard(other, SAMPLES[5:])
    garbage = find(bench)
    ours = bench.raced(lambda: publish(other, [shard], provenance={}))
    collect(ours.objects, garbage, {})
    bench.assert_serves(SAMPLES)


def test_a_collector_that_dies_leaves_the_rest_for_the_next(bench, gc) -> None:
    label_set = bench.filled(SAMPLES[:5], SAMPLES[5:])
    compact(label_set, {})
    dying = bench.dying(3)  # the announcement and two of four files
    with pytest.raises(bench.killed):
        collect(dying.objects, find(bench), {})
    bench.assert_serves(SAMPLES)
    assert len(gc(bench)) == 2
    bench.assert_serves(SAMPLES)


def test_a_record_that_was_replaced_stops_no_collection(bench, gc) -> None:
    """Its file is gone, so nobody knows when it superseded what."""
    label_set = bench.filled(SAMPLES[:5], SAMPLES[5:6], SAMPLES[6:])
    bench.files("commits/*")[1].unlink()
    repair(label_set, list(label_set.verify()), {})
    assert len(gc(bench)) == 3  # shard and index of sample 5
    bench.assert_serves([*SAMPLES[:5], *SAMPLES[6:]], SAMPLES)


def test_nothing_is_deleted_while_the_history_cannot_be_read(bench) -> None:
    label_set = bench.filled(SAMPLES[:5], SAMPLES[5:])
    compact(label_set, {})
    bench.damage(bench.files("commits/*")[1])
    with pytest.raises(LabelStoreError):
        find(bench)


def test_what_is_deleted_is_reported(bench) -> None:
    label_set = bench.filled(SAMPLES[:5], SAMPLES[5:])
    compact(label_set, {})
    garbage, seen = find(bench), []
    collect(label_set.objects, garbage, {}, advance=seen.append)
    assert sum(seen) == garbage.num_bytes > 0


# -- dropped sets ----------------------------------------------------------------------------------
def test_a_dropped_set_is_collected_whole(bench, gc) -> None:
    label_set = bench.filled(SAMPLES[:5], SAMPLES[5:])
    drop(label_set, {})
    assert bench.store.keys() == []
    assert len(find(bench, HOUR).paths) == 0
    gc(bench)
    assert not list(bench.folder().glob("shards/*"))
    # the records stay: their numbers may never be used twice
    assert len(bench.files("commits/*")) == 4


def test_a_late_writer_makes_a_dropped_set_anew(bench, gc) -> None:
    late = bench.filled(SAMPLES[:5])
    drop(bench.fresh(), {})
    gc(bench)
    late.append(SAMPLES[3:], {})
    bench.assert_serves(SAMPLES[3:], SAMPLES)
    late.append(SAMPLES[:3], {})
    bench.assert_serves(SAMPLES)


def test_a_writer_that_loses_its_race_to_a_drop_makes_the_set_anew(bench) -> None:
    other = bench.filled(SAMPLES[:5])
    bench.raced(lambda: drop(other, {})).append(SAMPLES[5:], {})
    bench.assert_serves(SAMPLES[5:], SAMPLES)


@pytest.mark.parametrize(("before", "path"), [("delete", "spec.json"), ("create", "/commits/")])
def test_what_is_committed_during_a_drop_is_dropped_with_the_rest(
    bench, before: str, path: str
) -> None:
    """Before the spec goes, or between that and the record: never a set that nobody finds."""
    writer = bench.filled(SAMPLES[:5])
    drop(bench.raced(lambda: writer.append(SAMPLES[5:8], {}), before=before, path=path), {})
    assert bench.store.keys() == []
    assert not bench.create().contains(KEYS).any()
    writer.append(SAMPLES[8:], {})
    bench.assert_serves(SAMPLES[8:], SAMPLES)


def test_a_drop_that_dies_leaves_the_set_or_none(bench) -> None:
    """Without its spec a set is not listed; whoever asks for it again finds its samples."""
    bench.filled(SAMPLES)
    for calls in (0, 1):
        with pytest.raises(bench.killed):
            drop(bench.dying(calls), {})
        assert bench.create().contains(KEYS).all()
    drop(bench.fresh(), {})
    assert not bench.create().contains(KEYS).any()


def test_dropping_twice_is_no_error(bench) -> None:
    label_set = bench.filled(SAMPLES[:5])
    drop(label_set, {})
    drop(label_set, {})
    assert bench.store.keys() == []


def test_a_reader_keeps_its_files_for_the_grace_period_of_a_drop(bench) -> None:
    bench.filled(SAMPLES)
    stream = bench.fresh().read(KEYS)
    next(stream)
    drop(bench.fresh(), {})
    assert [sample.key for sample in stream] == KEYS[1:]
