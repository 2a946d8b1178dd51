"""The fused loss against cross-entropy and against dense distillation: time and memory.

What is timed is the head alone: from hidden states to their gradient and that of the embedding.
Time is CPU seconds of one thread, contenders in turn; memory is the growth of the resident set in
one pass forward and back, VmHWM after it minus what the inputs occupy, in a process of its own that
gives back all it frees. A full run takes 15 to 20 minutes on two cores, ``--quick`` 3.
"""

import harness

# isort: split
import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.losses_contenders import (
    DIVERGENCES,
    DTYPES,
    HYBRID,
    SHAPES,
    Case,
    Head,
    K,
    is_dense,
)

ROUNDS = 3
DENSE_ROUNDS = {"V = 49k": 2, "V = 152k": 1}
DENSE_ROWS = {"V = 49k": 1.0, "V = 152k": 0.5}
"""Share of the rows with dense losses: JSD of 2048 rows and 152k tokens would take 19 GB."""
MOST_TIME = 1.05
MOST_MEMORY = {"V = 49k": 4, "V = 152k": 3}
LEAST_TIME = {"taid": 1.5, "jsd": 3.0}
LEAST_MEMORY = {"V = 49k": {"taid": 8, "jsd": 20}, "V = 152k": {"taid": 6, "jsd": 15}}
NOTES = (
    f"Hidden states to their gradient and the embedding's; {K} stored tokens, random labels. "
    "Hybrid: 0.9 forward KL and 0.1 cross-entropy; fused cross-entropy is the same kernel without "
    f"a soft term. Medians of {ROUNDS} rounds, of dense losses of 2 and, with 152k tokens, 1.",
    "V = 49k: hidden size 576 (SmolLM2-135M); V = 152k: 1024 (Qwen3-0.6B).",
    "Memory: growth of the resident set in one pass, gradients included, inputs not. Dense losses "
    "of 152k tokens: from a quarter and a half of the rows, along a straight line.",
    "Dense TAID: softmax and products in float32 over the vocabulary, as in the authors' code. "
    "Dense JSD: TRL's, on float32 logits, which is what mixed precision hands it.",
)
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
"""glibc then gives back all that is freed, so that only what is alive counts."""
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""glibc then keeps what is freed, as an allocator of GPU memory does."""


def timed(case: Case, names: Sequence[str], rounds: int = ROUNDS) -> harness.Times:
    """CPU seconds of some contenders in turn; a pass over few rows warms each of them up first.

    Fewer rounds than the other benchmarks make: a pass takes seconds, and varies little.
    """
    warm_up(case, names)
    contenders = Head(case, dense_teacher=any(map(is_dense, names))).contenders()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            start = time.process_time()
            contenders[name]()
            seconds[name].append(time.process_time() - start)
    return harness.Times(seconds)


def warm_up(case: Case, names: Sequence[str]) -> None:
    """Load what a first matrix product loads, with as few rows as that takes."""
    few = Head(Case(case.shape, case.dtype, 2), dense_teacher=any(map(is_dense, names)))
    contenders = few.contenders()
    for name in names:
        contenders[name]()


# -- memory ---------------------------------------------------------------------------------------
def measure_peaks(case: Case, names: Sequence[str]) -> dict[str, int]:
    """Bytes that one pass of each contender adds to this process at most, gradients included.

    All are compared with the process before the first of them, so what one leaves behind counts
    for those after it.
    """
    contenders = Head(case, dense_teacher=any(map(is_dense, names))).contenders()
    warm_up(case, names)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status_bytes("VmRSS")
    found = {}
    for name in names:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        contenders[name]()
        found[name] = _status_bytes("VmHWM") - before
    return found


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def child(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What this script prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    return done.stdout


def peaks(case: Case, names: Sequence[str]) -> dict[str, float]:
    """MiB that one pass of each contender adds, in a process that gives back what it frees."""
    request = json.dumps([case.shape, case.dtype, case.num_rows, list(names)])
    found: dict[str, int] = json.loads(child(["--peaks", request], GIVE_BACK))
    return {name: size / 2**20 for name, size in found.items()}


def dense_peaks(case: Case, names: Sequence[str]) -> dict[str, float]:
    """:func:`peaks` of dense contenders; of large ones from fewer rows, along a straight line."""
    if DENSE_ROWS[case.shape] == 1.0:
        return peaks(case, names)
    quarter, half = (
        peaks(Case(case.shape, case.dtype, case.num_rows // part), names) for part in (4, 2)
    )
    return {name: quarter[name] + 3 * (half[name] - quarter[name]) for name in names}


# -- goals ----------------------------------------------------------------------------------------
def time_goals(case: Case) -> list[harness.Goal]:
    """The hybrid against cross-entropy alone, ours and that of transformers."""
    times = timed(case, [HYBRID, "fused cross-entropy", "cross-entropy"])
    microseconds = 1e6 * times.of(HYBRID).median / case.num_rows
    goals = []
    for name, contender in (
        ("time, hybrid against fused cross-entropy", "fused cross-entropy"),
        ("time, hybrid against cross-entropy of transformers", "cross-entropy"),
    ):
        ratio = times.ratio(HYBRID, contender)
        ok = ratio.median <= MOST_TIME
        note = f"{microseconds:.0f} us per token" if contender == "cross-entropy" else ""
        goals.append(harness.Goal(f"{name}: {case}", f"<= {MOST_TIME}x", ratio.text("x"), ok, note))
    return goals


def dense_time_goals(case: Case) -> list[harness.Goal]:
    """TAID and generalised JSD as they are published against ours, which has a hard term too."""
    few = Case(case.shape, case.dtype, int(DENSE_ROWS[case.shape] * case.num_rows))
    names = [f"{kind} {name}" for name in LEAST_TIME for kind in ("fused", "dense")]
    times = timed(few, names, DENSE_ROUNDS[case.shape])
    goals = []
    for name, least in LEAST_TIME.items():
        ratio = times.ratio(f"dense {name}", f"fused {name}")
        goals.append(
            harness.Goal(
                f"time, dense {name} against fused: {case}",
                f">= {least:g}x",
                ratio.text("x"),
                ratio.median >= least,
                f"{few.num_rows} rows; no teacher run, no dense labels read",
            )
        )
    return goals


def divergence_goals(case: Case) -> list[harness.Goal]:
    """Every divergence against cross-entropy alone."""
    names = [f"fused {name}" for name in DIVERGENCES]
    times = timed(case, [*names, "fused cross-entropy"])
    ratios = {name: times.ratio(name, "fused cross-entropy") for name in names}
    slowest = max(ratios, key=lambda name: ratios[name].median)
    return [
        harness.Goal(
            f"time, slowest divergence against fused cross-entropy: {case}",
            f"<= {MOST_TIME}x",
            ratios[slowest].text("x"),
            ratios[slowest].median <= MOST_TIME,
            f"{slowest.removeprefix('fused ')}, of {len(names)}",
        )
    ]


def student_weight_goals(case: Case) -> list[harness.Goal]:
    """Weights and hard terms that need the student's own probabilities."""
    names = ["hybrid with wsl weights", "hybrid with the risk-guided term"]
    times = timed(case, [*names, "cross-entropy"])
    goals = []
    for name in names:
        ratio = times.ratio(name, "cross-entropy")
        goals.append(
            harness.Goal(
                f"time, {name} against cross-entropy of transformers: {case}",
                f"<= {MOST_TIME}x",
                ratio.text("x"),
                ratio.median <= MOST_TIME,
            )
        )
    return goals


def kept_memory_goals(case: Case) -> list[harness.Goal]:
    """Against transformers where freed memory is kept: half of its time here is page faults."""
    request = json.dumps([case.shape, case.dtype, case.num_rows, [HYBRID, "cross-entropy"]])
    found: dict[str, list[float]] = json.loads(child(["--times", request], KEEP_MEMORY))
    ratio = harness.Times(found).ratio(HYBRID, "cross-entropy")
    name = f"time, hybrid against transformers, freed memory kept: {case}"
    return [harness.Goal(name, "", ratio.text("x"), None, "glibc set to keep what is freed")]


def memory_goals(case: Case) -> list[harness.Goal]:
    """Peak memory against transformers, and how ours grows with the rows."""
    ours = peaks(case, [HYBRID])[HYBRID]
    theirs = peaks(case, ["cross-entropy"])["cross-entropy"]
    many_rows = 4 * case.num_rows
    many = peaks(Case(case.shape, case.dtype, many_rows), [HYBRID])[HYBRID]
    most = MOST_MEMORY[case.shape]
    return [
        harness.Goal(
            f"memory, hybrid against cross-entropy of transformers: {case}",
            f"<= 1/{most}",
            f"1/{theirs / ours:.1f}",
            ours <= theirs / most,
            f"{ours:.0f} and {theirs:.0f} MiB",
        ),
        harness.Goal(
            f"memory, {many_rows} tokens against {case.num_rows}: {case}",
            "<= +10 %",
            f"{100 * (many / ours - 1):+.1f} %",
            many <= 1.1 * ours,
            f"{many:.0f} MiB",
        ),
    ]


def dense_memory_goals(case: Case) -> list[harness.Goal]:
    """Peak memory of TAID and generalised JSD as they are published."""
    least = LEAST_MEMORY[case.shape]
    ours = peaks(case, [f"fused {name}" for name in least])
    theirs = dense_peaks(case, [f"dense {name}" for name in least])
    goals = []
    for name, times in least.items():
        fused, dense = ours[f"fused {name}"], theirs[f"dense {name}"]
        goals.append(
            harness.Goal(
                f"memory, dense {name} against fused: {case}",
                f">= {times}x",
                f"{dense / fused:.1f}x",
                dense >= times * fused,
                f"{dense:.0f} and {fused:.0f} MiB, the teacher's logits not counted",
            )
        )
    return goals


def gpu_goals() -> list[harness.Goal]:
    """What needs another machine."""
    return [
        harness.Goal("the same table on a GPU", "as above", harness.NOT_MEASURED, None),
        harness.Goal("share of the roofline on a GPU", ">= 70 %", harness.NOT_MEASURED, None),
    ]


def main() -> int:
    """Measure, print and write the page."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=2048, help="label rows (default: %(default)s)")
    parser.add_argument("--peaks", help=argparse.SUPPRESS)
    parser.add_argument("--times", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peaks or arguments.times:
        shape, dtype, num_rows, names = json.loads(arguments.peaks or arguments.times)
        case = Case(shape, dtype, num_rows)
        print(
            json.dumps(measure_peaks(case, names))
            if arguments.peaks
            else _seconds(timed(case, names))
        )
        return 0
    if arguments.quick:
        goals = quick_goals(arguments.rows)
    else:
        cases = [Case(shape, dtype, arguments.rows) for shape in SHAPES for dtype in DTYPES]
        goals = [goal for case in cases for goal in full_goals(case)]
        for more in (student_weight_goals, divergence_goals, kept_memory_goals):
            goals += more(cases[0])
    return harness.report([*goals, *gpu_goals()], notes=NOTES)


def full_goals(case: Case) -> list[harness.Goal]:
    """Everything about one case."""
    return [
        *time_goals(case),
        *memory_goals(case),
        *dense_time_goals(case),
        *dense_memory_goals(case),
    ]


def quick_goals(num_rows: int) -> list[harness.Goal]:
    """One case without dense losses, with half the rows where time is measured."""
    others = [f"{shape}, {dtype}" for shape in SHAPES for dtype in DTYPES][1:]
    return [
        *time_goals(Case("V = 49k", "bf16", num_rows // 2)),
        *memory_goals(Case("V = 49k", "bf16", num_rows)),
        *(harness.Goal(name, "", harness.FULL_ONLY, None) for name in ("dense losses", *others)),
    ]


def _seconds(times: harness.Times) -> str:
    return json.dumps({name: list(seconds) for name, seconds in times.seconds.items()})


if __name__ == "__main__":
    sys.exit(main())
