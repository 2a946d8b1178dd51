"""Merged records sum up history: they answer alike, and nothing depends on them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.compact import compact
from storage.errors import LabelStoreError
from storage.label_set import LabelSet
from storage.merge import merge, merge_due
from storage.records import CommitRecord
from storage.testing import make_sample, make_spec
from storage.writer import publish, write_shard

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC, num_tokens=2 + number % 3) for number in range(20)]
KEYS = [sample.key for sample in SAMPLES]


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every two records are merged, and every two of those."""
    monkeypatch.setattr("storage.log.MERGE_FACTOR", 2)


def answers(label_set: LabelSet) -> object:
    """Everything that a set says of its samples."""
    stored = [key for key, there in zip(KEYS, label_set.contains(KEYS), strict=True) if there]
    entries = label_set.locate(stored).entries
    shards = [label_set.index.shards[number].name for number in entries.shard.tolist()]
    places = [entries.row, entries.first_row, entries.num_rows, entries.num_tokens]
    totals = label_set.totals()
    return (
        stored,
        shards,
        [column.tolist() for column in places],
        totals,
        label_set.deleted,
        label_set.dropped,
    )


def without_merged(bench) -> LabelSet:
    """A new process that finds no merged record."""
    for path in bench.folder().glob("merged/*"):
        path.unlink()
    return bench.fresh()


@pytest.mark.usefixtures("pairs")
def test_merged_records_appear_at_the_powers(bench) -> None:
    bench.filled(*([sample] for sample in SAMPLES[:8]))
    names = [path.stem for path in bench.files("merged/*")]
    assert names == [
        "00000001-00000002",
        "00000001-00000004",
        "00000001-00000008",
        "00000003-00000004",
        "00000005-00000006",
        "00000005-00000008",
        "00000007-00000008",
    ]
    whole: CommitRecord = bench.fresh().log.merged(1, 8)
    assert [shard.since for shard in bench.fresh().log.shards(whole)] == list(range(1, 9))
    assert [index.num_samples for index in whole.indexes] == [8]
    assert (whole.num_samples, whole.num_shards, whole.shards) == (8, 8, ())
    bench.assert_serves(SAMPLES[:8], SAMPLES)


@settings(max_examples=10)
@given(
    steps=st.lists(
        st.lists(st.integers(0, 19), min_size=1, max_size=4) | st.just("compact"),
        min_size=1,
        max_size=9,
    )
)
def test_answers_are_the_same_with_and_without_merged_records(benches, steps) -> None:
    bench = benches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.log.MERGE_FACTOR", 2)
        reader, label_set = bench.create(), bench.create()
        for step in steps:
            if step == "compact":
                compact(label_set, {})
            else:
                label_set.append([SAMPLES[number] for number in step], {})
            # the reader takes up record after record, a new one begins with merged ones
            assert answers(reader) == answers(bench.fresh())
        expected = answers(reader)
        assert answers(without_merged(bench)) == expected
        stored = expected[0]
        assert [sample.key for sample in bench.fresh().read(stored)] == stored


@pytest.mark.usefixtures("pairs")
def test_of_copies_the_same_one_is_served_after_merging(bench) -> None:
    label_set = bench.filled(SAMPLES[:2])
    publish(label_set, [write_shard(label_set, SAMPLES[1:3])], provenance={})  # sample 1 again
    (first, second) = bench.fresh().log.singles()
    merged = bench.fresh().log.merged(1, 2)
    assert [index.num_samples for index in merged.indexes] == [3]  # the copy has no entry
    located = bench.fresh().locate(KEYS[:3])
    shards = bench.fresh().log.shards(merged)
    names = [shards[number].name for number in located.entries.shard.tolist()]
    assert names == [first.shards[0].name, first.shards[0].name, second.shards[0].name]
    bench.assert_serves(SAMPLES[:3], SAMPLES)


@pytest.mark.usefixtures("pairs")
def test_a_merged_record_removes_only_what_came_before_it(bench) -> None:
    label_set = bench.filled(SAMPLES[:1], SAMPLES[1:2])
    first, second = label_set.index.live_shards
    third = write_shard(label_set, SAMPLES[2:3])
    publish(label_set, [third], removed=[first.name], provenance={})
    publish(label_set, [], removed=[second.name, third.record.name], provenance={})
    merged = bench.fresh().log.merged(3, 4)
    assert set(merged.removed) == {first.name, second.name}
    assert (merged.shards, merged.indexes, merged.merged_shards) == ((), (), None)
    assert not bench.fresh().contains(KEYS).any()


@pytest.mark.usefixtures("pairs")
def test_a_shard_that_is_added_again_stays(bench) -> None:
    """As ``repair`` does with a damaged index: the same shard leaves and comes in one record."""
    label_set = bench.filled(SAMPLES[:1], SAMPLES[1:2])
    shards = [write_shard(label_set, SAMPLES[2:3])]
    publish(label_set, shards, provenance={})
    name = shards[0].record.name
    publish(label_set, shards, removed=[name], provenance={})
    merged = bench.fresh().log.merged(3, 4)
    assert [shard.name for shard in label_set.log.shards(merged)] == [name]
    bench.assert_serves(SAMPLES[:3], SAMPLES)


@pytest.mark.usefixtures("pairs")
def test_a_long_index_is_cut_into_ranges_of_keys(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.sample_index.RANGE_SAMPLES", 2)
    bench.filled(*([sample] for sample in SAMPLES[:8]))
    merged = bench.fresh().log.merged(1, 8)
    assert len(merged.indexes) > 1
    assert sum(index.num_samples for index in merged.indexes) == 8
    tables = [bench.fresh().open_index(index).table() for index in merged.indexes]
    assert np.concatenate([table["key_hi"].to_numpy() for table in tables]).tolist() == sorted(
        int(key[:16], 16) for key in KEYS[:8]
    )
    bench.assert_serves(SAMPLES[:8], SAMPLES)


def test_merging_again_changes_nothing(bench) -> None:
    label_set = bench.filled(SAMPLES[:1], SAMPLES[1:2])
    merge(label_set, 1, 2)
    (path,) = bench.files("merged/*")
    before = path.read_bytes()
    merge(label_set, 1, 2)
    assert path.read_bytes() == before
    bench.assert_serves(SAMPLES[:2], SAMPLES)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("broken", ["merged", "index"])
def test_a_merge_that_cannot_be_made_does_not_fail_the_commit(bench, broken: str) -> None:
    """The second commit is due to be merged; here it cannot write, or cannot read an index."""
    label_set = bench.filled(SAMPLES[:1])
    assert label_set.contains(KEYS[:2]).tolist() == [True, False]  # its index is in memory
    if broken == "merged":
        (bench.folder() / "merged").write_text("a file stands where a directory should")
        record = label_set.append(SAMPLES[1:2], {})
    else:
        (index,) = bench.files("index/*")
        away = index.rename(bench.root / "away")
        record = label_set.append(SAMPLES[1:2], {})
        away.rename(index)
    assert record is not None
    assert record.first == 2
    bench.assert_serves(SAMPLES[:2], SAMPLES)


@pytest.mark.usefixtures("pairs")
def test_a_merged_index_that_is_collected_too_early_leaves_no_merged_record(bench, gc) -> None:
    """With no grace at all, the index is a leftover until its record is there."""
    bench.filled(SAMPLES[:1])
    bench.raced(lambda: gc(bench), path="/merged/").append(SAMPLES[1:2], {})
    bench.assert_serves(SAMPLES[:2], SAMPLES)


def test_a_merge_over_a_gap_is_refused(bench) -> None:
    label_set = bench.filled(*([sample] for sample in SAMPLES[:3]))
    bench.files("commits/*")[1].unlink()
    with pytest.raises(LabelStoreError, match="is missing"):
        merge(label_set, 1, 3)
    merge_due(label_set, 3)
    assert not (bench.folder() / "merged").exists()
