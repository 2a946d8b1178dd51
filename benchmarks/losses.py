"""The fused loss against cross-entropy and against dense distillation: time and memory.

What is timed is the head alone: from hidden states to their gradient and that of the embedding.
Time is CPU seconds of one thread, contenders in turn; memory is the growth of the resident set of
a fresh process, VmHWM after one pass forward and back minus what the inputs occupy.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from student_train.losses.base import TeacherRows
from student_train.losses.config import soft_config
from student_train.losses.fused_linear import fused_linear_loss
from student_train.losses.linear_head import LinearHead
from student_train.losses.soft_term import SoftTerm, make_divergence

K = 64
ROWS, MANY_ROWS, QUICK_ROWS = 2048, 8192, 1024
DENSE_ROWS = {"V = 49k": 2048, "V = 152k": 1024}
"""Rows of dense losses: generalised JSD of 2048 rows and 152k tokens would take 19 GB."""
HYBRID = "fused forward_kl"
MOST_TIME = 1.05
NOTES = (
    f"Hidden states to their gradient and the embedding's; {ROWS} rows unless said, {K} stored "
    "tokens, random labels. Hybrid: 0.9 forward KL and 0.1 cross-entropy; fused cross-entropy is "
    "the same kernel without a soft term.",
    "V = 49k: hidden size 576 (SmolLM2-135M); V = 152k: 1024 (Qwen3-0.6B).",
    "Memory: growth of the resident set of a fresh process in one pass, gradients included, inputs "
    "not. Dense losses of 152k tokens: from 512 and 1024 rows, along a straight line.",
    "Dense TAID: softmax and products in float32 over the vocabulary, as in the authors' code. "
    "Dense JSD: TRL's, on float32 logits, which is what mixed precision hands it.",
)
SHAPES = {"V = 49k": (49_152, 576), "V = 152k": (151_936, 1024)}
"""Vocabulary and hidden size: those of SmolLM2-135M and Qwen3-0.6B."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCHEDULE = {"t": 0.4, "progress": 0.0}
SOFT, HARD = 0.9, 0.1
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "adaptive_kl",
    "entropy_adaptive_kl",
    "alpha_beta",
    "taid",
)
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
"""glibc then gives back all that is freed, so that only what is alive counts."""
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""glibc then keeps what is freed, as an allocator of GPU memory does."""


@dataclass(frozen=True, slots=True)
class Case:
    """One size of the problem."""

    shape: str
    dtype: str
    num_rows: int

    def __str__(self) -> str:
        return f"{self.shape}, {self.dtype}"


class Head:
    """Random hidden states, embedding and labels of one case, and one method per contender.

    Every method goes forward and back once, for the mean over rows.
    """

    def __init__(self, case: Case, *, dense_teacher: bool) -> None:
        vocab_size, width = SHAPES[case.shape]
        dtype = DTYPES[case.dtype]
        random = torch.Generator().manual_seed(0)
        self.num_rows, self.vocab_size = case.num_rows, vocab_size
        self.hidden = torch.randn(case.num_rows, width, generator=random).to(dtype)
        self.weight = torch.randn(vocab_size, width, generator=random).mul_(0.05).to(dtype)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        stride = vocab_size // K
        ids = torch.arange(K) * stride + torch.randint(stride, (case.num_rows, K), generator=random)
        logprobs = torch.randn(case.num_rows, K, generator=random).log_softmax(dim=-1)
        self.rows = TeacherRows(
            hard_M=ids[:, 3].clone(),
            topk_ids_MK=ids,
            topk_logprobs_MK=logprobs + torch.tensor(0.9).log(),
            log_tail_mass_M=torch.full((case.num_rows,), 0.1).log(),
        )
        if dense_teacher:
            self.teacher = torch.randn(case.num_rows, vocab_size, generator=random, dtype=dtype)

    def fused(self, divergence: SoftTerm | None) -> None:
        """Ours; None is cross-entropy alone."""
        terms = fused_linear_loss(
            self.hidden,
            LinearHead(self.weight),
            self.rows,
            divergence=divergence,
            soft_weight_M=torch.full((self.num_rows,), SOFT),
            hard_weight_M=torch.full((self.num_rows,), 1.0 if divergence is None else HARD),
            vocab_size=self.vocab_size,
        )
        self._backward(terms.total / self.num_rows)

    def cross_entropy(self) -> None:
        """As transformers computes it."""
        self._backward(
            ForCausalLMLoss(
                self._logits()[None], None, self.vocab_size, shift_labels=self.rows.hard_M[None]
            )
        )

    def dense_taid(self) -> None:
        """As the authors of TAID do: softmax and product in float32, the soft term alone."""
        logits = self._logits()
        mixture = (1 - SCHEDULE["t"]) * logits.detach() + SCHEDULE["t"] * self.teacher
        target = functional.softmax(mixture, dim=-1, dtype=torch.float32)
        logprobs = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
        products = torch.masked_fill(target * logprobs, torch.isinf(logits), 0)
        self._backward(-products.sum(dim=-1).sum() / self.num_rows)

    def dense_jsd(self) -> None:
        """As TRL does for GKD, on float32 logits as mixed precision returns them; beta 0.5."""
        student = functional.log_softmax(self._logits().float() / 1.0, dim=-1)
        teacher = functional.log_softmax(self.teacher.float() / 1.0, dim=-1)
        beta = torch.tensor(0.5)
        mixture = torch.logsumexp(
            torch.stack([student + torch.log(1 - beta), teacher + torch.log(beta)]), dim=0
        )
        to_teacher = functional.kl_div(mixture, teacher, reduction="none", log_target=True)
        to_student = functional.kl_div(mixture, student, reduction="none", log_target=True)
        divergence = beta * to_teacher + (1 - beta) * to_student
        self._backward(divergence.sum() / self.num_rows)

    def _logits(self) -> Tensor:
        return self.hidden @ self.weight.t()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()
        self.hidden.grad = self.weight.grad = None

    def contenders(self) -> dict[str, Callable[[], None]]:
        """Every contender by its name."""
        soft = {name: make_divergence(soft_config(name), schedule=SCHEDULE) for name in DIVERGENCES}
        return {
            **{f"fused {name}": partial(self.fused, term) for name, term in soft.items()},
            "fused cross-entropy": partial(self.fused, None),
            "cross-entropy": self.cross_entropy,
            "dense taid": self.dense_taid,
            "dense jsd": self.dense_jsd,
        }


def timed(case: Case, names: Sequence[str]) -> harness.Times:
    """CPU seconds of some contenders."""
    head = Head(case, dense_teacher=any(name.startswith("dense") for name in names))
    contenders = head.contenders()
    return harness.interleaved({name: contenders[name] for name in names})


# -- memory ---------------------------------------------------------------------------------------
def measure_peak(case: Case, name: str) -> int:
    """Bytes that one pass of a contender adds to this process at most, gradients included."""
    head = Head(case, dense_teacher=name.startswith("dense"))
    contender = head.contenders()[name]
    warm_up(case, name)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the inputs
    before = _status_bytes("VmRSS")
    contender()
    return _status_bytes("VmHWM") - before


def warm_up(case: Case, name: str) -> None:
    """Load what a first matrix product loads, with as few rows as that takes."""
    few = Head(Case(case.shape, case.dtype, 2), dense_teacher=name.startswith("dense"))
    few.contenders()[name]()


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


def peak(case: Case, name: str) -> float:
    """MiB that one pass adds, in a fresh process that gives back what it frees."""
    request = json.dumps([case.shape, case.dtype, case.num_rows, name])
    return int(child(["--peak", request], GIVE_BACK)) / 2**20


def dense_peak(case: Case, name: str) -> float:
    """:func:`peak` of a dense contender; of large ones from fewer rows, along a straight line."""
    few = DENSE_ROWS[case.shape]
    if case.num_rows <= few:
        return peak(case, name)
    half, whole = (peak(Case(case.shape, case.dtype, rows), name) for rows in (few // 2, few))
    return half + (whole - half) * (case.num_rows - few // 2) / (few - few // 2)


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
    pairs = {"taid": 1.5, "jsd": 3.0}
    times = timed(case, [f"{kind} {name}" for name in pairs for kind in ("fused", "dense")])
    goals = []
    for name, least in pairs.items():
        ratio = times.ratio(f"dense {name}", f"fused {name}")
        goals.append(
            harness.Goal(
                f"time, dense {name} against fused: {case}",
                f">= {least:g}x",
                ratio.text("x"),
                ratio.median >= least,
                f"{case.num_rows} rows; no teacher run, no dense labels read",
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


def kept_memory_goals(case: Case) -> list[harness.Goal]:
    """Against transformers where freed memory is kept: half of its time here is page faults."""
    request = json.dumps([case.shape, case.dtype, case.num_rows, [HYBRID, "cross-entropy"]])
    found: dict[str, list[float]] = json.loads(child(["--times", request], KEEP_MEMORY))
    ratio = harness.Times(found).ratio(HYBRID, "cross-entropy")
    name = f"the same, freed memory kept: {case}"
    return [harness.Goal(name, "", ratio.text("x"), None, "glibc set to keep what is freed")]


def memory_goals(case: Case, *, dense: bool) -> list[harness.Goal]:
    """Peak memory of the contenders, and how ours grows with the rows."""
    most, least = (
        (4, {"taid": 8, "jsd": 20})
        if case.shape == "V = 49k"
        else (
            3,
            {"taid": 6, "jsd": 15},
        )
    )
    ours, theirs = peak(case, HYBRID), peak(case, "cross-entropy")
    many = peak(Case(case.shape, case.dtype, MANY_ROWS), HYBRID)
    goals = [
        harness.Goal(
            f"memory, hybrid against cross-entropy of transformers: {case}",
            f"<= 1/{most}",
            f"1/{theirs / ours:.1f}",
            ours <= theirs / most,
            f"{ours:.0f} and {theirs:.0f} MiB",
        ),
        harness.Goal(
            f"memory, {MANY_ROWS} tokens against {case.num_rows}: {case}",
            "<= +10 %",
            f"{100 * (many / ours - 1):+.1f} %",
            many <= 1.1 * ours,
            f"{many:.0f} MiB",
        ),
    ]
    for name, times in least.items() if dense else ():
        found, fused = dense_peak(case, f"dense {name}"), peak(case, f"fused {name}")
        goals.append(
            harness.Goal(
                f"memory, dense {name} against fused: {case}",
                f">= {times}x",
                f"{found / fused:.1f}x",
                found >= times * fused,
                f"{found:.0f} MiB, the teacher's logits not counted",
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
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--times", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak or arguments.times:
        shape, dtype, num_rows, names = json.loads(arguments.peak or arguments.times)
        case = Case(shape, dtype, num_rows)
        print(measure_peak(case, names) if arguments.peak else _seconds(timed(case, names)))
        return 0
    if arguments.quick:
        goals = quick_goals()
    else:
        cases = [Case(shape, dtype, ROWS) for shape in SHAPES for dtype in DTYPES]
        goals = [goal for case in cases for goal in full_goals(case)]
        goals += divergence_goals(Case("V = 49k", "bf16", ROWS))
    return harness.report([*goals, *gpu_goals()], notes=NOTES)


def full_goals(case: Case) -> list[harness.Goal]:
    """Everything about one case."""
    dense_case = Case(case.shape, case.dtype, DENSE_ROWS[case.shape])
    return [
        *time_goals(case),
        *kept_memory_goals(case),
        *dense_time_goals(dense_case),
        *memory_goals(case, dense=True),
    ]


def quick_goals() -> list[harness.Goal]:
    """One case, with fewer rows where time is measured."""
    case = Case("V = 49k", "bf16", QUICK_ROWS)
    others = [f"{shape}, {dtype}" for shape in SHAPES for dtype in DTYPES][1:]
    return [
        *time_goals(case),
        *memory_goals(Case("V = 49k", "bf16", ROWS), dense=False),
        *(harness.Goal(name, "", harness.FULL_ONLY, None) for name in ("dense losses", *others)),
    ]


def _seconds(times: harness.Times) -> str:
    return json.dumps({name: list(seconds) for name, seconds in times.seconds.items()})


if __name__ == "__main__":
    sys.exit(main())
