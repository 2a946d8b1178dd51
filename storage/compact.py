"""Rewrite small shards as large ones, and drop copies of samples that are not served.

Every step takes some shards, writes their samples anew and swaps old for new in one commit
record, so a reader sees the old shards or the new ones. A step that is killed leaves only files
that nobody looks at.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from storage.label_set import LabelSet
from storage.partitions import MAX_PARTITION_BITS, PARTITION_TOKENS, shard_bits
from storage.records import Name, ShardRecord
from storage.sample_index import SampleIndex
from storage.writer import SHARD_ROWS, publish, split, write_shard

SMALL_ROWS = SHARD_ROWS // 2
"""Shards with fewer label rows are put together."""

MAX_REWRITES = 4
"""Most times that one call writes a sample anew."""


@dataclass(slots=True)
class Compacted:
    """What was done."""

    shards_before: int = 0
    shards_after: int = 0
    num_samples: int = 0
    """Samples that were written anew."""
    num_copies: int = 0
    """Copies of samples that were not served and are gone now."""


def compact(
    label_set: LabelSet,
    provenance: dict[str, str],
    *,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> Compacted:
    """Compact a label set until nothing is left to do; other readers and writers may go on.

    Args:
        label_set: The set.
        provenance: Recorded with every commit.
        advance: Called with the bytes of the shards of every step.

    Raises:
        ShardCorruptError: if a shard is damaged; run ``repair`` first.
        LabelStoreError: if the store cannot be written; finished steps stay.
    """
    done = Compacted()
    rewrites: dict[Name, int] = {}
    label_set.refresh()
    wasteful = _with_copies(label_set)
    while True:
        label_set.refresh()
        bits = _grown_bits(label_set)
        step = next(_steps(label_set, bits, wasteful, rewrites), None)
        if step is None:
            return done
        times = 1 + max(rewrites.get(shard.name, 0) for shard in step)
        written = _rewrite(label_set, step, bits, provenance, done)
        rewrites.update(dict.fromkeys((shard.name for shard in step), MAX_REWRITES))
        rewrites.update(dict.fromkeys(written, times))
        advance(sum(shard.num_bytes for shard in step))


def _grown_bits(label_set: LabelSet) -> int:
    """Partition bits for the tokens that are stored now: doubled while partitions are too large."""
    bits = label_set.partition_bits
    num_tokens = sum(shard.num_tokens for shard in label_set.live_shards(fresh=False))
    while bits < MAX_PARTITION_BITS and num_tokens > 2 * PARTITION_TOKENS * 2**bits:
        bits += 1
    return bits


def _steps(
    label_set: LabelSet, bits: int, wasteful: set[Name], rewrites: Mapping[Name, int]
) -> Iterator[list[ShardRecord]]:
    """Shards to rewrite together: such with dead copies, and small ones that are neighbours."""
    shards = [
        s for s in label_set.live_shards(fresh=False) if rewrites.get(s.name, 0) < MAX_REWRITES
    ]
    for shard in shards:
        if shard.name in wasteful:
            yield [shard]
    small = [shard for shard in shards if shard.num_rows < SMALL_ROWS]
    for group in _groups(sorted(small, key=lambda shard: shard.partition)):
        cut = _cut_bits(group, bits)
        whole = all(len(shard.partition) >= cut for shard in group)
        if not whole or len({shard.partition[:cut] for shard in group}) < len(group):
            yield group


def _cut_bits(group: list[ShardRecord], bits: int) -> int:
    """Leading bits by which the samples of some shards are cut, so that no piece is tiny."""
    return shard_bits(sum(shard.num_tokens for shard in group), bits)


def _groups(shards: list[ShardRecord]) -> Iterator[list[ShardRecord]]:
    """Consecutive shards that have at most SHARD_ROWS rows together."""
    group: list[ShardRecord] = []
    num_rows = 0
    for shard in shards:
        if group and num_rows + shard.num_rows > SHARD_ROWS:
            yield group
            group, num_rows = [], 0
        group.append(shard)
        num_rows += shard.num_rows
    if group:
        yield group


def _with_copies(label_set: LabelSet) -> set[Name]:
    """Shards that hold samples which are served from another one."""

    def search(index: SampleIndex) -> set[Name]:
        served = np.zeros(index.num_shards, dtype=np.int64)
        for entries in index.live_entries():
            served += np.bincount(entries.shard, minlength=len(served))
        shards = zip(index.shards, index.alive.tolist(), served.tolist(), strict=True)
        return {shard.name for shard, alive, count in shards if alive and count < shard.num_samples}

    return label_set.ask(search, fresh=False)


def _rewrite(
    label_set: LabelSet,
    old: list[ShardRecord],
    bits: int,
    provenance: dict[str, str],
    done: Compacted,
) -> list[Name]:
    """Write the served samples of some shards anew; left undone if another host was faster.

    Returns:
        Names of the new shards.
    """
    keys = [key for shard in old for key in _served_keys(label_set, shard)]
    groups = split(list(label_set.read(keys)), _cut_bits(old, bits))
    new = [write_shard(label_set, group, bits=bits) for group in groups]
    since = min(shard.since for shard in old)  # the winners of all copies stay the winners
    names = [shard.name for shard in old]
    while True:
        alive = {shard.name for shard in label_set.live_shards()}
        if not alive.issuperset(names) or any(n.record.name in label_set.deleted for n in new):
            return []
        record = publish(
            label_set,
            [shard.since(since) for shard in new],
            removed=names,
            partition_bits=bits,
            provenance=provenance,
        )
        if record is not None:
            break
    done.shards_before += len(old)
    done.shards_after += len(new)
    done.num_samples += len(keys)
    done.num_copies += sum(shard.num_samples for shard in old) - len(keys)
    return [shard.record.name for shard in new]


def _served_keys(label_set: LabelSet, shard: ShardRecord) -> list[str]:
    """Keys of the samples that are served from this shard and from no other."""
    with label_set.open_table(shard, "samples") as file:
        keys: list[str] = file.table(["sample_key"])["sample_key"].to_pylist()
    served = label_set.served_from(shard, keys).tolist()
    return [key for key, here in zip(keys, served, strict=True) if here]
