"""Planning against sets of up to 1e8 samples: time, memory, and how both grow with the set.

A set is its history and its index; shards are not made, because planning opens none. The files are
written by the package's own functions with made-up shards. The smallest set grows commit by commit.
Of larger ones only the records and indexes that a reader opens have content: what merged records
stand for is simulated, as empty files that are listed and never read.
"""

import harness

# isort: split
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.planning_sets import (
    FACTS,
    LARGE_COMMIT,
    SPEC,
    TOKENS,
    History,
    asked_keys,
    create_set,
)
from storage.label_set import LabelSet
from storage.store import LabelStore
from storage.testing import make_sample

NUM_KEYS = 1_000_000
SMALLEST, PROMISED, LARGEST = 100_000, 10_000_000, 100_000_000
SMALL_COMMIT = 64
"""Samples of a commit by default."""
RUNS, QUICK_RUNS = 3, 1
APPENDS, GROWING_COMMITS = 24, 300


@dataclass(frozen=True, slots=True)
class Planned:
    """One fresh process that planned."""

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
