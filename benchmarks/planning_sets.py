"""Label sets for the planning benchmark, grown or simulated. Not a benchmark by itself."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import numpy as np

from storage.durable import write_index, write_shard_table
from storage.index import Entries, format_keys
from storage.label_set import LabelSet
from storage.log import MERGE_FACTOR
from storage.partitions import Keys, common_partition, leading_bits, shard_bits
from storage.records import CommitRecord, FileRecord, MergedShards, Name, ShardRecord
from storage.sample_index import RANGE_SAMPLES
from storage.shard import BATCH_ROWS
from storage.store import LabelStore
from storage.testing import make_spec
from storage.writer import NewShard, number_shards, publish

TOKENS = 256
"""Response tokens of every sample."""
BYTES_PER_TOKEN = 172
LARGE_COMMIT = 1024
"""Samples that fill a shard: a commit is never larger."""
SPEC = make_spec(k=8, vocab_size=100)
FACTS = {"backend": "vllm", "git": "0123456789ab", "host": "node-17", "vllm": "0.32.0"}


@dataclass(frozen=True, slots=True)
class History:
    """How a set came to be."""

    num_samples: int
    commit_samples: int
    compacted: bool = False
    """Small shards were rewritten as large ones, at the end."""

    @property
    def num_commits(self) -> int:
        """Commits of samples."""
        return self.num_samples // self.commit_samples

    @property
    def num_records(self) -> int:
        """Commits of samples, and those of ``compact``."""
        steps = -(-self.num_commits // (LARGE_COMMIT // self.commit_samples))
        return self.num_commits + (steps if self.compacted else 0)

    @property
    def name(self) -> str:
        """Such as ``1e7``."""
        mantissa, _, exponent = f"{self.num_samples:.0e}".partition("e")
        return f"{mantissa}e{int(exponent)}"

    @property
    def kind(self) -> str:
        """How it was made, whatever its size."""
        return f"commits of {self.commit_samples}" + (", compacted" if self.compacted else "")


# -- making a set ---------------------------------------------------------------------------------
Change = tuple[list[Name], list[NewShard]]
"""What one commit record does: shards that it removes, and those that it adds."""


def keys_of(number: int, count: int) -> Keys:
    """Keys of the samples of a commit, uint64[N, 2]."""
    return np.random.default_rng(number).integers(0, 2**64, (count, 2), dtype=np.uint64)


def made_up_shard(keys: Keys, since: int, bits: int) -> NewShard:
    """A shard of samples that nobody labelled."""
    count, name = len(keys), os.urandom(12).hex()
    rows = count * TOKENS
    full, rest = divmod(rows, BATCH_ROWS)
    record = ShardRecord.model_construct(
        name=f"{name[:16]}-{name[16:]}",
        partition=common_partition(keys, bits),
        labels=made_up_file(BYTES_PER_TOKEN * rows),
        samples=made_up_file(300 * count),
        batch_rows=(BATCH_ROWS,) * full + ((rest,) if rest else ()),
        num_samples=count,
        num_rows=rows,
        num_tokens=rows,
        since=since,
    )
    number = np.arange(count, dtype=np.int32)
    length = np.full(count, TOKENS, dtype=np.int32)
    zeros = np.zeros_like(number)
    return NewShard(record, Entries(keys, zeros, number, number * TOKENS, length, length))


def made_up_file(num_bytes: int) -> FileRecord:
    """A file that nobody wrote."""
    return FileRecord.model_construct(num_bytes=num_bytes, xxh3_128=os.urandom(16).hex())


def shards_of(keys: Keys, number: int, bits: int) -> list[NewShard]:
    """The shards of a commit, cut by partitions as the writer cuts."""
    keys = keys[np.lexsort((keys[:, 1], keys[:, 0]))]
    cut = leading_bits(keys, shard_bits(len(keys) * TOKENS, bits))
    return [made_up_shard(keys[cut == value], number, bits) for value in np.unique(cut).tolist()]


def changes(history: History, bits: int) -> Iterator[Change]:
    """Commit after commit, then the steps of ``compact``, each of which fills a shard."""
    small: list[list[Name]] = []
    for number in range(1, history.num_commits + 1):
        shards = shards_of(keys_of(number, history.commit_samples), number, bits)
        small.append([shard.record.name for shard in shards])
        yield [], shards
    group = LARGE_COMMIT // history.commit_samples
    for first in range(1, history.num_commits + 1, group) if history.compacted else ():
        numbers = range(first, min(first + group, history.num_commits + 1))
        keys = np.concatenate([keys_of(number, history.commit_samples) for number in numbers])
        keys = keys[np.lexsort((keys[:, 1], keys[:, 0]))]
        removed = [name for number in numbers for name in small[number - 1]]
        yield removed, [made_up_shard(keys, first, bits)]


def create_set(uri: str, history: History, *, grown: bool) -> LabelSet:
    """A label set with this history, made commit by commit or simulated."""
    store = LabelStore(uri, create=True)
    label_set = store.create(SPEC, FACTS, expected_tokens=history.num_samples * TOKENS)
    with unflushed():
        if grown:
            for removed, shards in changes(history, label_set.partition_bits):
                assert publish(label_set, shards, removed=removed, provenance=FACTS) is not None
        else:
            simulate(label_set, history)
    return label_set


@contextlib.contextmanager
def unflushed() -> Iterator[None]:
    """Leave it to the kernel when files reach the disk: nobody pulls the plug here."""
    with mock.patch("os.fsync"):
        yield


def simulate(label_set: LabelSet, history: History) -> None:
    """The records that a reader of the same history opens, and empty files for the others."""
    assert label_set.objects.root is not None
    commits = label_set.objects.root / label_set.prefix / "commits"
    commits.mkdir(parents=True)
    stream = changes(history, label_set.partition_bits)
    first = 1
    while first <= history.num_records:
        span = widest_merge(first, history)
        removed: list[Name] = []
        added: dict[Name, NewShard] = {}
        for number, (gone, shards) in enumerate(itertools.islice(stream, span), start=first):
            removed += [name for name in gone if added.pop(name, None) is None]
            added.update((shard.record.name, shard) for shard in shards)
            if span > 1:
                (commits / f"{number:08d}.json").touch()
        shards = tuple(shard.record for shard in added.values())
        entries = number_shards([shard.entries for shard in added.values()])
        merged, index = None, None
        if span > 1:
            merged = write_merged(label_set, shards, entries)
        elif entries is not None:
            index = write_index(label_set, entries)
        record = CommitRecord(
            label_set=label_set.key,
            first=first,
            last=first + span - 1,
            removed=tuple(removed),
            shards=shards if span == 1 else (),
            index=index,
            merged_shards=merged,
            created_at="2026-01-01T00:00:00+00:00",
            provenance=FACTS,
        )
        assert label_set.log.create(record, merged=span > 1)
        first += span


def write_merged(
    label_set: LabelSet, shards: Sequence[ShardRecord], entries: Entries | None
) -> MergedShards | None:
    """The files of a merged record, its indexes cut as ``storage.merge`` cuts them."""
    if entries is None:
        return None
    ranges = [
        entries.take(np.arange(start, min(start + RANGE_SAMPLES, len(entries))))
        for start in range(0, len(entries), RANGE_SAMPLES)
    ]
    return write_shard_table(label_set, shards, [write_index(label_set, part) for part in ranges])


def widest_merge(first: int, history: History) -> int:
    """Records of the largest merged one that starts at ``first``; 1 if there is none."""
    span = 1
    while (first - 1) % (span * MERGE_FACTOR) == 0:
        last = first + span * MERGE_FACTOR - 1
        if last > history.num_records:
            break
        span *= MERGE_FACTOR
    return span


def asked_keys(history: History, count: int) -> list[str]:
    """Sample keys in random order; half of them are stored, or all samples if fewer are."""
    random = np.random.default_rng(0)
    wanted = min(count // 2, history.num_commits * history.commit_samples)
    per_commit = -(-wanted // history.num_commits)
    chosen = random.permutation(history.num_commits)[: -(-wanted // per_commit)] + 1
    stored = [keys_of(int(n), history.commit_samples)[:per_commit] for n in chosen]
    absent = random.integers(0, 2**64, (count - wanted, 2), dtype=np.uint64)
    keys = np.concatenate([np.concatenate(stored)[:wanted], absent])
    return format_keys(random.permutation(keys))
