"""Planning against sets of up to 1e8 samples: time, memory, and how both grow with the set.

A set is its history and its index; shards are not made, because planning opens none. The files are
written by the package's own functions with made-up shards. The smallest set grows commit by commit.
Of larger ones only the records and indexes that a reader opens have content: what merged records
stand for is simulated, as empty files that are listed and never read.
"""

import harness

# isort: split
import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from storage.durable import write_index, write_shard_table
from storage.index import Entries, format_keys
from storage.label_set import LabelSet
from storage.log import MERGE_FACTOR
from storage.partitions import Keys, common_partition, leading_bits, shard_bits
from storage.records import CommitRecord, FileRecord, MergedShards, Name, ShardRecord
from storage.sample_index import RANGE_SAMPLES
from storage.shard import BATCH_ROWS
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from storage.writer import NewShard, number_shards, publish

NUM_KEYS = 1_000_000
TOKENS = 256
"""Response tokens of every sample."""
BYTES_PER_TOKEN = 172
SMALLEST, PROMISED, LARGEST = 100_000, 10_000_000, 100_000_000
LARGE_COMMIT = 1024
"""Samples that fill a shard: a commit is never larger."""
SMALL_COMMIT = 64
"""Samples of a commit by default."""
RUNS, QUICK_RUNS = 3, 1
APPENDS, GROWING_COMMITS = 24, 300
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


# -- measuring ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Planned:
    """One fresh process that planned a million keys."""

    seconds: float
    """From opening the store to the plan."""
    history_seconds: float
    """Of those, reading the history."""
    peak_bytes: int
    """Of the whole process, keys included."""
    hits: int


def plan_here(uri: str, keys_file: str) -> Planned:
    """Plan in this process."""
    keys = Path(keys_file).read_text().split()
    pa.array(np.zeros(1))  # imports pandas where it is installed
    start = time.perf_counter()
    view = LabelStore(uri).view(SPEC)
    view.sets[0].refresh()
    history = time.perf_counter()
    plan = view.plan(keys)
    end = time.perf_counter()
    status = Path("/proc/self/status").read_text()  # ru_maxrss counts the parent's memory too
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    hits = int(plan.hits.sum())
    assert hits + int(plan.misses.sum()) == len(keys)
    return Planned(end - start, history - start, int(peak) * 1024, hits)


def append_here(uri: str) -> list[float]:
    """Seconds of every one of some small commits of this process, the first one left out.

    As in labelling, what is missing is asked once for all of them.
    """
    label_set = LabelStore(uri).open(SPEC.key)
    random = np.random.default_rng(os.getpid())
    numbers = random.integers(0, 2**62, ((APPENDS + 1), SMALL_COMMIT)).tolist()
    commits = [[make_sample(number, SPEC) for number in group] for group in numbers]
    label_set.missing([sample.key for samples in commits for sample in samples])
    seconds = []
    for samples in commits:
        start = time.perf_counter()
        assert label_set.append(samples, FACTS) is not None
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def grow_here(uri: str) -> list[float]:
    """CPU seconds of every one of many tiny commits of this process to a new set."""
    label_set = LabelStore(uri, create=True).create(SPEC, FACTS)
    samples = [make_sample(number, SPEC, num_tokens=2) for number in range(4 * GROWING_COMMITS)]
    seconds = []
    for first in range(0, len(samples), 4):
        start = time.process_time()
        assert label_set.append(samples[first : first + 4], FACTS) is not None
        seconds.append(time.process_time() - start)
    return seconds


def in_fresh_process(*arguments: str) -> Any:
    """What this script prints when it measures."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


@dataclass(frozen=True, slots=True)
class Measured:
    """All processes that worked on one set."""

    history: History
    planned: list[Planned]
    """Of a million keys."""
    planned_tenth: list[Planned]
    """Of a tenth as many keys as the set has samples."""
    append_seconds: list[float]
    index_bytes: int
    num_shards: int

    @property
    def seconds(self) -> harness.Figure:
        """Of planning."""
        return figure([run.seconds for run in self.planned])

    @property
    def history_seconds(self) -> float:
        """Of planning, reading the history."""
        return statistics.median(run.history_seconds for run in self.planned)

    @property
    def peak_bytes(self) -> int:
        """The worst."""
        return max(run.peak_bytes for run in self.planned)

    @property
    def append_ms(self) -> harness.Figure:
        """Of a commit."""
        return figure([1e3 * seconds for seconds in self.append_seconds])


def figure(values: list[float]) -> harness.Figure:
    """A median with its spread."""
    return harness.Figure(statistics.median(values), min(values), max(values))


def measure(history: History, folder: Path, *, runs: int) -> Measured:
    """Make the set, measure and remove it."""
    uri = str(folder / "store")
    print(f"{history.name} samples, {history.kind} ...", flush=True)
    label_set = create_set(uri, history, grown=history.num_samples <= SMALLEST)
    reopened = LabelStore(uri).open(SPEC.key)
    num_shards = reopened.totals().num_shards
    if history.num_samples <= SMALLEST:
        check_simulation(label_set, history, folder)
    index_bytes = sum(size for _, size, _ in label_set.objects.entries(f"{label_set.prefix}/index"))
    planned, planned_tenth = (
        [plan_fresh(uri, history, count, folder) for _ in range(runs)]
        for count in (NUM_KEYS, history.num_samples // 10)
    )
    append_seconds = in_fresh_process("--append", uri)
    shutil.rmtree(uri)
    found = Measured(history, planned, planned_tenth, append_seconds, index_bytes, num_shards)
    print(
        f"  {found.seconds.text(' s')} to plan, {found.append_ms.text(' ms')} to commit", flush=True
    )
    return found


def plan_fresh(uri: str, history: History, count: int, folder: Path) -> Planned:
    """Plan so many keys in a fresh process."""
    keys_file = folder / "keys.txt"
    keys_file.write_text("\n".join(asked_keys(history, count)))
    planned = Planned(**in_fresh_process("--plan", uri, "--keys", str(keys_file)))
    assert planned.hits == min(count // 2, history.num_commits * history.commit_samples)
    return planned


def check_simulation(grown: LabelSet, history: History, folder: Path) -> None:
    """A simulated set is read in the same steps as one that grew, and tells the same."""
    simulated = create_set(str(folder / "simulated"), history, grown=False)
    steps = [
        [(r.first, r.last, len(r.removed), r.num_shards, r.num_samples) for r in s.log.walk(1)]
        for s in (grown, simulated)
    ]
    assert steps[0] == steps[1]
    shutil.rmtree(folder / "simulated")


# -- the table ------------------------------------------------------------------------------------
def planning_goals(found: Measured) -> list[harness.Goal]:
    """Time and memory of a million keys against one set."""
    history, promised = found.history, found.history.num_samples == PROMISED
    seconds, gigabytes = found.seconds, found.peak_bytes / 2**30
    name = f"{history.name} samples, {history.kind}"
    return [
        harness.Goal(
            f"plan 1 M keys: {name}",
            "< 10 s" if promised else "",
            seconds.text(" s"),
            seconds.median < 10 if promised else None,
            f"{found.history_seconds:.2f} s of it for the history: {history.num_records} records, "
            f"{found.num_shards} shards served; index {found.index_bytes / 1e6:.0f} MB",
        ),
        harness.Goal(
            f"peak memory: {name}",
            "< 2 GB" if promised else "",
            f"{gigabytes:.2f} GB",
            gigabytes < 2 if promised else None,
            "the whole process, the keys included",
        ),
    ]


def us_per_key(runs: Sequence[Planned], num_keys: int) -> float:
    """Microseconds of planning, per key."""
    return 1e6 * figure([run.seconds for run in runs]).median / num_keys


def growth_goals(kind: Sequence[Measured]) -> list[harness.Goal]:
    """What a key and a commit cost in the largest set against the smallest."""
    small, large = kind[0], kind[-1]
    names = f"{large.history.name} against {small.history.name}, {large.history.kind}"
    tenth = [us_per_key(m.planned_tenth, m.history.num_samples // 10) for m in (small, large)]
    million = [us_per_key(m.planned, NUM_KEYS) for m in (small, large)]
    per_commit = large.append_ms.median / small.append_ms.median
    return [
        harness.Goal(
            f"cost per key, a tenth as many as samples: {names}",
            "<= 2x",
            f"{tenth[1] / tenth[0]:.2f}x",
            tenth[1] <= 2 * tenth[0],
            f"{tenth[0]:.2f} and {tenth[1]:.2f} us per key",
        ),
        harness.Goal(
            f"cost per key of a million: {names}",
            "",
            f"{million[1] / million[0]:.2f}x",
            None,
            f"{million[0]:.2f} and {million[1]:.2f} us per key; "
            f"{large.history.num_samples // small.history.num_samples} times as many samples",
        ),
        harness.Goal(
            f"cost of a commit of {SMALL_COMMIT} samples: {names}",
            "<= 2x",
            f"{per_commit:.2f}x",
            per_commit <= 2,
            f"{small.append_ms.text(' ms', digits=0)} and {large.append_ms.text(' ms', digits=0)}",
        ),
    ]


def persistence_goals(seconds: Sequence[float]) -> list[harness.Goal]:
    """What a commit costs a process that has made many."""
    early, late = (figure([1e3 * s for s in part]) for part in (seconds[10:60], seconds[-50:]))
    return [
        harness.Goal(
            f"CPU of a commit of 4 samples: the last 50 of {len(seconds)} of one process",
            "<= 2x",
            f"{late.median / early.median:.2f}x",
            late.median <= 2 * early.median,
            f"the 11th to the 60th: {early.text(' ms', digits=1)}, {late.text(' ms', digits=1)}",
        )
    ]


def main() -> int:
    """Measure, print the table and write the page."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the sets are made")
    parser.add_argument("--plan", metavar="STORE", help=argparse.SUPPRESS)
    parser.add_argument("--keys", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--append", metavar="STORE", help=argparse.SUPPRESS)
    parser.add_argument("--grow", metavar="STORE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        print(json.dumps(asdict(plan_here(arguments.plan, arguments.keys))))
        return 0
    if arguments.append:
        print(json.dumps(append_here(arguments.append)))
        return 0
    if arguments.grow:
        print(json.dumps(grow_here(arguments.grow)))
        return 0
    large, small = LARGE_COMMIT, SMALL_COMMIT
    kinds = [[History(size, large) for size in (SMALLEST, 10 * SMALLEST, PROMISED)]]
    if not arguments.quick:
        kinds[0].append(History(LARGEST, large))
        kinds.append([History(size, small) for size in (SMALLEST, PROMISED)])
        kinds.append([History(size, small, compacted=True) for size in (SMALLEST, PROMISED)])
    goals = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for kind in kinds:
            runs = QUICK_RUNS if arguments.quick else RUNS
            found = [measure(history, Path(folder), runs=runs) for history in kind]
            goals += [goal for one in found for goal in planning_goals(one)]
            goals += growth_goals(found)
        goals += persistence_goals(in_fresh_process("--grow", str(Path(folder) / "grown")))
    if arguments.quick:
        goals += [
            harness.Goal(f"plan 1 M keys: {name}", goal, harness.FULL_ONLY, None)
            for name, goal in (
                ("1e8 samples, commits of 1024", ""),
                ("1e7 samples, commits of 64", "< 10 s"),
                ("1e7 samples, commits of 64, compacted", "< 10 s"),
            )
        ]
    notes = [
        f"Seconds here are wall time of fresh processes, {RUNS} of each (one if quick), files "
        "in the page cache: from opening the store to the plan. Half of the keys are stored, all "
        "samples where fewer are.",
        f"Samples have {TOKENS} tokens, so {LARGE_COMMIT} of them fill a shard, and no commit is "
        f"larger; {SMALL_COMMIT} is the default. No labels: planning opens no shard.",
        f"Sets above {SMALLEST} samples are simulated: the merged records and indexes that a "
        "reader opens are written by the package, with made-up shards, instead of by growing "
        "them; at the smallest size both ways are compared. Compacted: every step fills one shard.",
        "A tenth as many keys as samples: a project that grows with its store. A million keys are "
        "spread over every batch of a large index, so planning them reads 16 bytes of every stored "
        "sample: from some 1e7 samples on, that is what grows.",
        f"A commit: `append` of {SMALL_COMMIT} new samples of five tokens by one process that has "
        "asked before which of all its samples are missing, as labelling does; the "
        f"first one left out, {APPENDS} commits, fsync included.",
    ]
    return harness.report(goals, notes=notes)


if __name__ == "__main__":
    sys.exit(main())
