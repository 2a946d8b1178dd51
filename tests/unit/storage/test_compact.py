"""Compaction changes where samples lie and nothing else."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.compact import Compacted, compact
from storage.errors import ShardCorruptError
from storage.label_set import LabelSet
from storage.testing import make_sample, make_spec
from storage.writer import publish, write_shard

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC, num_tokens=4) for number in range(24)]
KEYS = [sample.key for sample in SAMPLES]
ONE_BY_ONE = [[sample] for sample in SAMPLES]


def bits_of(label_set: LabelSet) -> list[str]:
    """Every field of every sample, to the last bit."""
    stored = [key for key in KEYS if key not in label_set.missing(KEYS)]
    return [
        repr([getattr(sample, name) for name in type(sample).__dataclass_fields__])
        for sample in label_set.read(stored)
    ]


def publish_copies(label_set: LabelSet, numbers: list[int]) -> None:
    """Commit samples again, without looking, and with another content."""
    copies = [replace(SAMPLES[number], finish_reason="stop") for number in numbers]
    assert publish(label_set, [write_shard(label_set, copies)], provenance={}) is not None


# -- small shards ----------------------------------------------------------------------------------
def test_small_shards_become_one_of_fewer_bytes(bench) -> None:
    label_set = bench.filled(*ONE_BY_ONE)
    before, bits = label_set.totals(), bits_of(label_set)
    done = compact(label_set, {})
    assert (done.shards_before, done.shards_after, done.num_samples) == (24, 1, 24)
    after = bench.fresh().totals()
    assert (after.num_shards, after.num_samples) == (1, 24)
    assert (after.num_tokens, after.num_rows) == (before.num_tokens, before.num_rows)
    assert after.num_bytes < before.num_bytes / 4
    assert bits_of(bench.fresh()) == bits
    bench.assert_serves(SAMPLES)


def test_samples_of_a_compacted_shard_are_in_key_order(bench) -> None:
    label_set = bench.filled(*ONE_BY_ONE)
    compact(label_set, {})
    (shard,) = label_set.index.live_shards
    keys = label_set.open_table(shard, "samples").table(["sample_key"])["sample_key"].to_pylist()
    assert keys == sorted(KEYS)
    assert shard.since == 1


def test_a_compacted_set_is_left_alone(bench) -> None:
    label_set = bench.filled(*ONE_BY_ONE)
    compact(label_set, {})
    before = bench.contents()
    assert compact(label_set, {}) == Compacted()
    assert compact(bench.fresh(), {}) == Compacted()
    assert bench.contents() == before


@pytest.mark.parametrize("commits", [[], [SAMPLES]], ids=["no shard", "one shard"])
def test_there_is_nothing_to_do_for_less_than_two_shards(bench, commits) -> None:
    label_set = bench.filled(*commits)
    assert compact(label_set, {}) == Compacted()


def test_shards_do_not_grow_beyond_their_size(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 20 rows hold 5 samples of 4; those of 10 rows and more stay as they are."""
    for name in ("storage.compact.SHARD_ROWS", "storage.writer.SHARD_ROWS"):
        monkeypatch.setattr(name, 20)
    monkeypatch.setattr("storage.compact.SMALL_ROWS", 10)
    large = SAMPLES[12:15]
    label_set = bench.filled(large, *ONE_BY_ONE[:12])
    kept = label_set.index.live_shards[0].name
    compact(label_set, {})
    sizes = [shard.num_samples for shard in label_set.index.live_shards]
    assert kept in [shard.name for shard in label_set.index.live_shards]
    assert max(sizes) <= 5
    assert len(sizes) <= 5  # 3 + (5 + 5 + 2), or better
    bench.assert_serves(SAMPLES[:15], SAMPLES)


def test_what_was_read_is_reported(bench) -> None:
    label_set = bench.filled(*ONE_BY_ONE)
    num_bytes, seen = label_set.totals().num_bytes, []
    compact(label_set, {}, advance=seen.append)
    assert sum(seen) == num_bytes


# -- partitions ------------------------------------------------------------------------------------
@pytest.fixture
def tiny_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 samples of 4 tokens: partitions double while they hold more than 2 * 16 tokens."""
    monkeypatch.setattr("storage.compact.PARTITION_TOKENS", 16)
    monkeypatch.setattr("storage.partitions.MIN_SHARD_TOKENS", 16)


@pytest.mark.usefixtures("tiny_partitions")
def test_partitions_are_doubled_as_a_set_grows(bench) -> None:
    label_set = bench.filled(SAMPLES[:12], SAMPLES[12:])
    bits = bits_of(label_set)
    compact(label_set, {})
    # 96 tokens: 1 * 32 < 96, 2 * 32 < 96, 4 * 32 >= 96
    assert bench.fresh().totals().num_partitions == 4
    for shard in bench.fresh().index.live_shards:
        assert len(shard.partition) == 2
    partitions = [shard.partition for shard in label_set.index.live_shards]
    assert sorted(partitions) == ["00", "01", "10", "11"]
    assert bits_of(bench.fresh()) == bits
    bench.assert_serves(SAMPLES)
    assert compact(label_set, {}) == Compacted()


@pytest.mark.usefixtures("tiny_partitions")
def test_no_sample_is_written_twice_when_partitions_double(bench) -> None:
    label_set = bench.filled(SAMPLES[:12], SAMPLES[12:])
    done = compact(label_set, {})
    assert (done.shards_before, done.shards_after, done.num_samples) == (2, 4, 24)


@pytest.mark.usefixtures("tiny_partitions")
def test_writers_cut_by_the_new_partitions(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.partitions.MIN_SHARD_TOKENS", 4)
    writer = bench.filled(SAMPLES[:10], SAMPLES[10:20])
    compact(bench.fresh(), {})
    record = writer.append(SAMPLES[20:], {})
    assert {len(shard.partition) for shard in record.shards} == {2}
    bench.assert_serves(SAMPLES)


# -- copies ----------------------------------------------------------------------------------------
def test_copies_that_are_not_served_are_dropped(bench) -> None:
    label_set = bench.filled(SAMPLES[:6])
    publish_copies(label_set, [4, 5, 6, 7])
    expected = [*SAMPLES[:6], *(replace(s, finish_reason="stop") for s in SAMPLES[6:8])]
    bench.assert_serves(expected)
    done = compact(label_set, {})
    assert done.num_copies == 2
    assert bench.fresh().totals().num_samples == 8
    bench.assert_serves(expected, SAMPLES)


def test_a_shard_of_nothing_but_copies_goes_without_a_successor(bench) -> None:
    label_set = bench.filled(SAMPLES[:6])
    publish_copies(label_set, [0, 1])
    done = compact(label_set, {})
    assert (done.shards_before, done.shards_after, done.num_samples) == (1, 0, 0)
    assert [shard.num_samples for shard in label_set.index.live_shards] == [6]
    bench.assert_serves(SAMPLES[:6], SAMPLES)


@settings(max_examples=10)
@given(
    st.lists(
        st.lists(st.integers(0, 23), min_size=1, max_size=5, unique=True), min_size=1, max_size=6
    )
)
def test_of_copies_the_same_ones_are_served_afterwards(benches, commits) -> None:
    bench = benches()
    label_set = bench.create()
    for numbers in commits:
        publish_copies(label_set, numbers)
    bits = bits_of(bench.fresh())
    compact(label_set, {})
    assert bits_of(bench.fresh()) == bits
    stored = {number for numbers in commits for number in numbers}
    totals = bench.fresh().totals()
    assert (totals.num_samples, totals.num_shards) == (len(stored), 1)


# -- others at the same time -----------------------------------------------------------------------
def test_a_commit_that_comes_between_is_kept(bench) -> None:
    other = bench.filled(*ONE_BY_ONE[:6])
    ours = bench.raced(lambda: other.append(SAMPLES[6:9], {}))
    compact(ours, {})
    bench.assert_serves(SAMPLES[:9], SAMPLES)
    assert bench.fresh().totals().num_shards == 1


def test_two_hosts_that_compact_do_the_work_once(bench) -> None:
    other = bench.filled(*ONE_BY_ONE[:6])
    ours = bench.raced(lambda: compact(other, {}))
    assert compact(ours, {}) == Compacted()
    totals = bench.fresh().totals()
    assert (totals.num_shards, totals.num_samples) == (1, 6)
    bench.assert_serves(SAMPLES[:6], SAMPLES)


def test_an_open_set_whose_index_files_are_gone_can_be_compacted(
    bench, gc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were merged and collected meanwhile, as ``contains`` and ``read`` survive it."""
    monkeypatch.setattr("storage.log.MERGE_FACTOR", 2)
    label_set = bench.filled(SAMPLES[:1])
    stale = bench.fresh()
    assert stale.contains(KEYS).sum() == 1
    label_set.append(SAMPLES[1:2], {})
    gc(bench)
    compact(stale, {})
    bench.assert_serves(SAMPLES[:2], SAMPLES)


def test_a_damaged_shard_stops_it_and_loses_nothing(bench) -> None:
    label_set = bench.filled(*ONE_BY_ONE[:3])
    damaged = bench.root / label_set.files()[1]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    with pytest.raises(ShardCorruptError):
        compact(bench.fresh(), {})
    damaged.write_bytes(whole)
    bench.assert_serves(SAMPLES[:3], SAMPLES)
