"""Appending: one commit or none, every sample once, whoever else writes."""

import datetime
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from storage.errors import BadLabelError, LabelStoreError
from storage.garbage import collect, find_garbage
from storage.label_set import LabelSet
from storage.records import CommitRecord
from storage.testing import make_sample, make_spec
from storage.writer import NewShard, SamplesPart, publish, write_shard

ROOT = Path(__file__).resolve().parents[3]
SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC) for number in range(12)]
KEYS = [sample.key for sample in SAMPLES]
AT_ONCE = datetime.timedelta(0)


def history(bench) -> list[CommitRecord]:
    return list(bench.fresh().log.singles())


# -- one commit ------------------------------------------------------------------------------------
def test_an_append_is_one_record(bench) -> None:
    record = bench.create().append(SAMPLES[:5], {"writer": "ours"})
    assert record is not None
    assert (record.first, record.last, record.num_samples) == (1, 1, 5)
    assert record.provenance == {"writer": "ours"}
    assert history(bench) == [record]
    bench.assert_serves(SAMPLES[:5], SAMPLES)


def test_a_record_tells_all_that_a_reader_needs(bench) -> None:
    record = bench.create().append(SAMPLES[:3], {})
    (shard,) = record.shards
    # 3 samples of 5 rows in one batch
    assert (shard.num_samples, shard.num_rows, shard.num_tokens) == (3, 15, 15)
    assert (shard.batch_rows, shard.since, shard.partition) == ((15,), 1, "")
    assert record.index.num_samples == 3
    assert record.index.first_keys == (min(KEYS[:3]),)
    labels, samples, index = (
        bench.folder() / "shards" / f"{shard.name}.labels.arrow",
        bench.folder() / "shards" / f"{shard.name}.samples.arrow",
        bench.folder() / "index" / f"{record.index.name}.arrow",
    )
    shard.labels.require(labels.read_bytes(), name="labels")
    shard.samples.require(samples.read_bytes(), name="samples")
    record.index.file.require(index.read_bytes(), name="index")


def test_a_large_append_is_one_record_of_several_shards(
    bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 samples of 5 tokens in 4 partitions, shards of 15 tokens at least: 60 / 15 = 4."""
    monkeypatch.setattr("storage.partitions.MIN_SHARD_TOKENS", 15)
    monkeypatch.setattr("storage.partitions.PARTITION_TOKENS", 15)
    label_set = bench.create(expected_tokens=60)
    record = label_set.append(SAMPLES, {})
    first_bits = {format(int(key[:2], 16), "08b")[:2] for key in KEYS}
    assert {shard.partition for shard in record.shards} == first_bits
    assert len(record.shards) == len(first_bits) > 1
    bench.assert_serves(SAMPLES)


def test_samples_appended_twice_are_stored_once(bench) -> None:
    label_set = bench.filled(SAMPLES[:3])
    assert label_set.append(SAMPLES[:3], {}) is None
    second = label_set.append(SAMPLES[2:5], {})
    assert second.num_samples == 2  # samples 3 and 4
    assert label_set.totals().num_samples == 5


def test_of_a_sample_given_twice_in_one_call_the_first_is_stored(bench) -> None:
    other = replace(SAMPLES[0], finish_reason="stop")
    record = bench.create().append([SAMPLES[0], other, SAMPLES[0]], {})
    assert record.num_samples == 1
    bench.assert_serves(SAMPLES[:1])


def test_appending_nothing_commits_nothing(bench) -> None:
    assert bench.create().append([], {}) is None
    assert history(bench) == []


def test_nothing_is_written_when_one_sample_is_bad(bench) -> None:
    label_set = bench.create()
    before = bench.contents()
    with pytest.raises(BadLabelError, match="token_rank is below 1"):
        label_set.append([SAMPLES[0], replace(SAMPLES[1], token_rank_N=np.zeros(5, np.int32))], {})
    assert bench.contents() == before


def test_committed_bytes_never_change(bench) -> None:
    label_set = bench.filled(SAMPLES[:3])
    before = bench.contents()
    label_set.append(SAMPLES, {})
    after = bench.contents()
    assert {path: after[path] for path in before} == before
    # one record, one index and one shard of two files
    assert len(after) == len(before) + 4


# -- several writers -------------------------------------------------------------------------------
def test_of_two_open_sets_with_the_same_samples_the_first_is_served_and_stored_once(bench) -> None:
    one, other = bench.create(), bench.create()
    assert one.append(SAMPLES[:5], {}).num_samples == 5
    changed = [replace(sample, finish_reason="stop") for sample in SAMPLES[3:]]
    record = other.append(changed, {})
    assert (record.first, record.num_samples) == (2, 7)
    assert one.missing(KEYS) == []
    assert bench.fresh().totals().num_samples == 12
    bench.assert_serves([*SAMPLES[:5], *changed[2:]])


def test_a_race_lost_to_other_samples_keeps_its_shard(bench) -> None:
    """Both writers saw no commit; the other one takes number 1."""
    other = bench.create()
    ours = bench.raced(lambda: other.append(SAMPLES[:5], {}))
    record = ours.append(SAMPLES[5:], {})
    assert (record.first, record.num_samples) == (2, 7)
    assert len(bench.files("shards/*.labels.arrow")) == 2  # nothing was written twice
    assert [shard.since for r in history(bench) for shard in r.shards] == [1, 2]
    bench.assert_serves(SAMPLES)


def test_a_race_lost_to_some_of_the_samples_commits_the_others(bench) -> None:
    other = bench.create()
    ours = bench.raced(lambda: other.append(SAMPLES[:5], {}))
    record = ours.append([replace(s, finish_reason="stop") for s in SAMPLES[3:6]], {})
    assert (record.first, record.num_samples) == (2, 1)
    # the shard of the lost race stays on disk, named by no record
    assert len(bench.files("shards/*.labels.arrow")) == 3
    bench.assert_serves([*SAMPLES[:5], replace(SAMPLES[5], finish_reason="stop")])


def test_a_race_lost_to_the_same_samples_commits_nothing(bench) -> None:
    other = bench.create()
    assert bench.raced(lambda: other.append(SAMPLES, {})).append(SAMPLES[:2], {}) is None
    assert len(history(bench)) == 1
    bench.assert_serves(SAMPLES)


def test_a_race_for_one_of_two_shards_keeps_the_other(
    bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of two samples of 5 rows; the other writer takes a sample of the first."""
    monkeypatch.setattr("storage.writer.SHARD_ROWS", 10)
    ordered = sorted(SAMPLES[:4], key=lambda sample: sample.key)
    other = bench.create()
    record = bench.raced(lambda: other.append(ordered[:1], {})).append(ordered, {})
    assert [shard.num_samples for shard in record.shards] == [1, 2]
    assert len(bench.files("shards/*.labels.arrow")) == 4  # other's, two of ours, one anew
    bench.assert_serves(ordered, SAMPLES)


def test_a_writer_whose_answers_are_lost_stores_everything_once(bench) -> None:
    bench.create()
    ours = bench.lossy()
    for samples in (SAMPLES[:5], SAMPLES[5:]):
        assert ours.append(samples, {}) is not None
    assert len(history(bench)) == 2
    assert bench.fresh().totals().num_samples == 12
    bench.assert_serves(SAMPLES)


def test_an_announced_deletion_makes_the_writer_write_anew(bench) -> None:
    """gc runs between the shard and its record: the files go, so the same names may not be used."""
    collector = bench.filled(SAMPLES[:1])

    def collect_everything() -> None:
        garbage = find_garbage(collector.objects, collector.key, AT_ONCE)
        assert len(garbage.paths) == 3  # the two files of the shard, and the index
        collect(collector.objects, garbage, {})

    record = bench.raced(collect_everything).append(SAMPLES[1:3], {})
    assert record.first == 3  # 2 is the announcement
    (announcement,) = [r for r in history(bench) if r.deleted]
    assert record.shards[0].name not in announcement.deleted
    bench.assert_serves(SAMPLES[:3], SAMPLES)


def test_of_copies_the_lower_record_is_served_for_ever(bench) -> None:
    """Two records can only share a sample when somebody commits without looking."""
    label_set = bench.filled(SAMPLES[:1])
    changed = replace(SAMPLES[0], finish_reason="stop")
    assert publish(label_set, [write_shard(label_set, [changed])], provenance={}) is not None
    bench.assert_serves(SAMPLES[:1])


def test_a_part_is_written_once(bench) -> None:
    label_set = bench.create()
    part = SamplesPart(SAMPLES[:2])
    shard: NewShard = part.written(label_set)
    assert part.written(label_set) is shard
    assert shard.since(7).record.since == 7
    label_set.deleted.add(shard.record.name)
    assert part.written(label_set).record.name != shard.record.name


WRITERS = """
import os, sys
from storage.shard import encode_shard
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

spec = make_spec()
samples = [make_sample(number, spec) for number in range(12)]
encode_shard(samples, spec)  # pyarrow imports pandas at its first use
waiting, start = os.pipe()
for first in (0, 2, 4, 6):
    if os.fork() == 0:
        os.close(start)
        os.read(waiting, 1)  # returns when the parent closes its end: all start together
        labels = LabelStore(sys.argv[1], create=True).create(spec, {})
        for number in range(first, first + 6, 2):
            labels.append(samples[number : number + 2], {"writer": str(first)})
        os._exit(0)
os.close(start)
sys.exit(max(os.wait()[1] for _ in range(4)))
"""


def test_concurrent_processes_store_every_sample_once(bench) -> None:
    """Four writers of samples 0-5, 2-7, 4-9 and 6-11 start together: 12 samples in all.

    They are forks of a process that has not touched a store yet, which saves three imports.
    """
    subprocess.run([sys.executable, "-c", WRITERS, bench.uri], cwd=ROOT, check=True, timeout=50)
    records = history(bench)
    assert [record.first for record in records] == list(range(1, len(records) + 1))
    assert sum(record.num_samples for record in records) == 12
    bench.assert_serves(SAMPLES)


KILLED_WRITER = """
import os, signal, sys
from storage.label_set import LabelSet
from storage.objects import Objects
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

class DyingObjects(Objects):
    def create(self, path, data):
        if "/commits/" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().create(path, data)

spec = make_spec()
document = LabelStore(sys.argv[1]).open(spec.key).document
LabelSet(DyingObjects(sys.argv[1]), document).append([make_sample(1, spec)], {})
"""


def test_a_writer_killed_before_its_commit_leaves_nothing_visible(bench) -> None:
    label_set = bench.filled(SAMPLES[:1])
    died = subprocess.run([sys.executable, "-c", KILLED_WRITER, bench.uri], cwd=ROOT, check=False)
    assert died.returncode == -signal.SIGKILL
    assert len(bench.files("shards/*")) == 4  # both shards are on disk
    bench.assert_serves(SAMPLES[:1], SAMPLES)
    label_set.append(SAMPLES[:2], {})
    bench.assert_serves(SAMPLES[:2], SAMPLES)


# -- the buffer in front of it ---------------------------------------------------------------------
def test_a_writer_commits_whenever_its_buffer_is_full(bench) -> None:
    with bench.create().writer({}, commit_samples=5) as writer:
        sizes = []
        for sample in SAMPLES:
            writer.add(sample)
            sizes.append(writer.committed)
    assert sizes == [0, 0, 0, 0, 5, 5, 5, 5, 5, 10, 10, 10]
    assert writer.committed == 12
    assert [record.num_samples for record in history(bench)] == [5, 5, 2]
    bench.assert_serves(SAMPLES)


def test_a_writer_commits_when_its_rows_fill_a_shard(
    bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.writer.SHARD_ROWS", 15)
    with bench.create().writer({}, commit_samples=100) as writer:
        for sample in SAMPLES[:7]:
            writer.add(sample)
    assert [record.num_samples for record in history(bench)] == [3, 3, 1]


def test_after_an_error_only_what_was_committed_stays(bench) -> None:
    writer = bench.create().writer({}, commit_samples=5)

    def interrupted() -> None:
        with writer:
            for sample in SAMPLES[:7]:
                writer.add(sample)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert writer.committed == 5
    bench.assert_serves(SAMPLES[:5], SAMPLES)


def test_a_bad_sample_is_not_taken_and_costs_no_other(bench) -> None:
    with bench.create().writer({}, commit_samples=5) as writer:
        writer.add(SAMPLES[0])
        with pytest.raises(BadLabelError):
            writer.add(replace(SAMPLES[1], token_rank_N=np.zeros(5, np.int32)))
        writer.add(SAMPLES[2])
    bench.assert_serves([SAMPLES[0], SAMPLES[2]], SAMPLES)


def test_a_flush_of_nothing_commits_nothing(bench) -> None:
    with bench.create().writer({}, commit_samples=5) as writer:
        writer.flush()
    assert history(bench) == []


def test_samples_stay_in_the_buffer_when_the_store_cannot_be_written(bench) -> None:
    label_set: LabelSet = bench.create()
    writer = label_set.writer({}, commit_samples=2)
    writer.add(SAMPLES[0])
    (bench.folder() / "shards").write_text("a file stands where a directory should")
    with pytest.raises(LabelStoreError):
        writer.add(SAMPLES[1])
    (bench.folder() / "shards").unlink()
    writer.flush()
    bench.assert_serves(SAMPLES[:2], SAMPLES)
