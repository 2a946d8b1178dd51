"""A label set serves what was committed, in any order, and never anything else."""

import datetime
from dataclasses import replace

import pytest

from storage.compact import compact
from storage.errors import LabelStoreError, NotLabelledError, ShardCorruptError
from storage.garbage import collect, find_garbage
from storage.label_batch import LabelBatch
from storage.label_set import LabelSet
from storage.shard import ShardReader
from storage.testing import make_sample, make_spec

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC, num_tokens=3 + number % 3) for number in range(8)]
KEYS = [sample.key for sample in SAMPLES]
AT_ONCE = datetime.timedelta(0)


def compact_and_collect(label_set: LabelSet) -> None:
    """What another process might do while this one reads."""
    compact(label_set, {})
    garbage = find_garbage(label_set.objects, label_set.key, AT_ONCE)
    assert garbage.paths
    collect(label_set.objects, garbage, {})


def test_samples_read_as_they_were_appended(bench) -> None:
    bench.filled(SAMPLES[:5])
    bench.assert_serves(SAMPLES[:5], SAMPLES)


def test_samples_are_read_in_the_order_that_was_asked_for(bench) -> None:
    bench.filled(SAMPLES[:4], SAMPLES[4:])
    order = [KEYS[number] for number in (6, 1, 7, 0, 1)]
    assert [sample.key for sample in bench.fresh().read(order)] == order


def test_a_partly_labelled_response_reads_back_whole(bench, score_mode, labelled_in_part) -> None:
    """Score mode: the unlabelled tokens are in no label row and are kept beside them."""
    spec = score_mode(SPEC)
    sample = labelled_in_part(SAMPLES[2], [1, 3])
    bench.filled([sample], spec=spec)
    bench.assert_serves([sample], spec=spec)


def test_a_stop_string_is_kept(bench) -> None:
    sample = replace(SAMPLES[0], finish_reason="stop", stop_reason="\n\n")
    bench.filled([sample])
    bench.assert_serves([sample])


def test_missing_samples_are_listed_in_their_order(bench) -> None:
    label_set = bench.filled([SAMPLES[1]])
    assert label_set.missing([KEYS[2], KEYS[1], KEYS[0]]) == [KEYS[2], KEYS[0]]
    assert label_set.missing([]) == []


def test_reading_a_sample_that_is_not_stored_says_how_many_are_missing(bench) -> None:
    label_set = bench.filled(SAMPLES[:1])
    with pytest.raises(NotLabelledError, match=rf"lacks 2 of 3 samples \(the first is {KEYS[1]}"):
        list(label_set.read(KEYS[:3]))


@pytest.mark.parametrize("key", ["", "12", "g" * 32, "0" * 31, "0" * 33])
def test_what_is_no_sample_key_is_the_callers_mistake(bench, key: str) -> None:
    label_set = bench.filled(SAMPLES[:1])
    with pytest.raises(ValueError, match="hex"):
        label_set.contains([key])


def test_totals_count_samples_tokens_and_rows(bench, score_mode, labelled_in_part) -> None:
    spec = score_mode(SPEC)
    whole = [labelled_in_part(sample, range(len(sample.positions_N))) for sample in SAMPLES[:2]]
    part = labelled_in_part(SAMPLES[2], [0, 4])
    bench.filled(whole, [part], spec=spec)
    totals = bench.fresh(spec).totals()
    # samples of 3, 4 and 5 tokens, of which 3, 4 and 2 are labelled
    assert (totals.num_commits, totals.num_shards, totals.num_samples) == (2, 2, 3)
    assert (totals.num_tokens, totals.num_rows) == (12, 9)
    shards = bench.files("shards/*", spec)
    assert totals.num_bytes == sum(path.stat().st_size for path in shards)


def test_files_are_those_of_the_samples_that_are_served(bench) -> None:
    label_set = bench.filled(SAMPLES[:4], SAMPLES[4:])
    before = label_set.files()
    compact(label_set, {})
    assert [str(path.relative_to(bench.root)) for path in bench.files("shards/*.labels.arrow")] == (
        sorted([*before, *label_set.files()])
    )
    (labels,), (samples,) = label_set.files(), label_set.files("samples")
    assert samples == labels.replace(".labels.", ".samples.")


def test_an_open_set_takes_up_what_others_commit(bench) -> None:
    reader = bench.create()
    assert not reader.contains(KEYS).any()
    bench.filled(SAMPLES)
    assert reader.contains(KEYS).all()


# -- what is held in memory ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("held_bytes", "decoded"),
    [
        (2**28, 8),  # every batch once
        (0, 22),  # only the last batch stays: 8, then 7 back, then 7 forth
    ],
)
def test_batches_are_decoded_again_when_memory_is_full(
    bench, monkeypatch: pytest.MonkeyPatch, held_bytes: int, decoded: int
) -> None:
    bench.filled(*([sample] for sample in SAMPLES))
    monkeypatch.setattr("storage.label_set.HELD_BYTES", held_bytes)
    monkeypatch.setattr("storage.label_set.HELD_SHARDS", 2)
    numbers = []
    batch = ShardReader.batch

    def counted(self: ShardReader, number: int) -> LabelBatch:
        numbers.append(number)
        return batch(self, number)

    monkeypatch.setattr(ShardReader, "batch", counted)
    order = [*KEYS, *KEYS[::-1], *KEYS]
    assert [sample.key for sample in bench.fresh().read(order)] == order
    assert len(numbers) == decoded


# -- what others do meanwhile ----------------------------------------------------------------------
def test_a_reader_survives_compaction_and_collection_of_its_files(bench) -> None:
    bench.filled(*([sample] for sample in SAMPLES))
    cold, warm = bench.fresh(), bench.fresh()
    assert warm.contains(KEYS).all()
    compact_and_collect(bench.fresh())
    for reader in (cold, warm):
        for found, expected in zip(reader.read(KEYS), SAMPLES, strict=True):
            bench.assert_same(found, expected)


def test_reading_goes_on_when_its_shards_are_replaced_half_way(bench) -> None:
    bench.filled(*([sample] for sample in SAMPLES))
    stream = bench.fresh().read(KEYS)
    bench.assert_same(next(stream), SAMPLES[0])
    compact_and_collect(bench.fresh())
    for found, expected in zip(stream, SAMPLES[1:], strict=True):
        bench.assert_same(found, expected)


def test_a_question_between_two_samples_does_not_disturb_the_reading(
    bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index files of the reader are merged and deleted, so the question starts over."""
    monkeypatch.setattr("storage.log.MERGE_FACTOR", 2)
    bench.filled(SAMPLES[:1], SAMPLES[1:2], SAMPLES[2:])
    reader = bench.fresh()
    stream = reader.read(KEYS)
    bench.assert_same(next(stream), SAMPLES[0])
    compact_and_collect(bench.fresh())
    assert reader.contains(KEYS).all()
    for found, expected in zip(stream, SAMPLES[1:], strict=True):
        bench.assert_same(found, expected)


def test_two_readings_of_one_set_do_not_disturb_each_other(bench) -> None:
    label_set = bench.filled(SAMPLES[:4], SAMPLES[4:])
    pairs = zip(label_set.read(KEYS), label_set.read(KEYS[::-1]), strict=True)
    assert [(one.key, other.key) for one, other in pairs] == list(
        zip(KEYS, KEYS[::-1], strict=True)
    )


# -- damage ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("table", ["labels", "samples"])
def test_a_missing_shard_file_is_refused(bench, table: str) -> None:
    bench.filled(SAMPLES[:3])
    bench.files(f"shards/*.{table}.arrow")[0].unlink()
    with pytest.raises(
        ShardCorruptError, match=rf"\.{table}\.arrow .*was committed: 3 samples are lost"
    ):
        list(bench.fresh().read(KEYS[:3]))


@pytest.mark.parametrize("pattern", ["shards/*.labels.arrow", "shards/*.samples.arrow", "index/*"])
def test_a_truncated_file_is_refused(bench, pattern: str) -> None:
    bench.filled(SAMPLES[:3])
    (path,) = bench.files(pattern)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardCorruptError, match=f"{path.name} has .* truncated or replaced"):
        list(bench.fresh().read(KEYS[:3]))


def test_a_missing_index_is_refused(bench) -> None:
    bench.filled(SAMPLES[:3])
    bench.files("index/*")[0].unlink()
    with pytest.raises(ShardCorruptError, match=r"but it was committed: run `distill repair`"):
        bench.fresh().contains(KEYS)


@pytest.mark.parametrize("table", ["labels", "samples"])
def test_no_flipped_bit_changes_what_is_served(bench, table: str) -> None:
    """Every 20th byte; a flip in padding or framing is harmless, any other one is refused."""
    bench.filled(SAMPLES[:3])
    (path,) = bench.files(f"shards/*.{table}.arrow")
    whole, refused = path.read_bytes(), 0
    positions = range(0, len(whole), len(whole) // 100)
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            found = list(bench.fresh().read(KEYS[:3]))
        except LabelStoreError:
            refused += 1
        else:
            for sample, expected in zip(found, SAMPLES, strict=False):
                bench.assert_same(sample, expected)
    assert refused > len(positions) // 3


def test_damage_in_one_shard_leaves_the_others_readable(bench) -> None:
    label_set = bench.filled(SAMPLES[:3], SAMPLES[3:])
    first, _ = label_set.files()
    (bench.root / first).write_bytes(b"")
    assert [sample.key for sample in bench.fresh().read(KEYS[3:])] == KEYS[3:]
    assert [problem.lost_samples for problem in bench.fresh().verify()] == [3]


def test_a_record_with_other_counts_is_found_by_verify(bench) -> None:
    bench.filled(SAMPLES[:3])
    bench.edit(
        bench.files("commits/*")[0],
        lambda document: document["shards"][0].update(num_samples=4),
    )
    (problem,) = bench.fresh().verify()
    assert "do not hold the 4 samples" in problem.error


def test_a_store_that_cannot_be_written_keeps_what_was_committed(bench) -> None:
    label_set = bench.filled(SAMPLES[:3])
    shards = bench.folder() / "shards"
    shards.rename(shards.with_name("elsewhere"))
    shards.write_text("a file stands where a directory should")
    with pytest.raises(LabelStoreError, match="committed before is intact"):
        label_set.append(SAMPLES[3:], {})
    shards.unlink()
    shards.with_name("elsewhere").rename(shards)
    bench.assert_serves(SAMPLES[:3], SAMPLES)
