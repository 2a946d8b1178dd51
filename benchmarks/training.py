"""The trainer's step, loader and start-up against what a practitioner would otherwise run.

One process makes the labels and takes turns between contenders; memory is the peak of processes of
their own. A full run takes about 20 minutes on two cores, ``--quick`` 4.

TRL is compared with where it can be imported. It is no dependency: its pins are not ours. Put it in
a folder of its own, ``pip install --no-deps --target DIRECTORY trl``, and name that in PYTHONPATH.
"""

import harness

# isort: split
import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import pyarrow as pa
import torch

from benchmarks.made_up_labels import Answers
from benchmarks.training_contenders import (
    KINDS,
    TRAININGS,
    Contenders,
    Distillation,
    Sizes,
    has_trl,
)
from storage.columns import scalar_columns
from storage.labels import label_kind
from storage.schema import SCALAR_FIELDS
from storage.store import LabelStore
from student_train.config import BatchConfig, LabelSource, LoaderConfig, TrainConfig
from student_train.streaming.reader import LabelReader, MicroBatch, collate
from student_train.streaming.step_plan import TrainingPlan, split_by_padded_size
from student_train.streaming.stream import BatchStream
from student_train.trainer import plan_training

VOCAB_SIZE = 49_152
MOST_TIME, MOST_WAIT = 1.10, 0.02
MOST_KL = 1.01  # "the same" is taken as within 1 %: the samples of a batch differ
LEAST_ONLINE, LEAST_PACKED, LEAST_LOADER = 3.0, 1.8, 0.5
FULL = Sizes(micro_tokens=2048, hidden=256, layers=4, teacher_hidden=1024, teacher_layers=7)
QUICK = Sizes(micro_tokens=512, hidden=128, layers=2, teacher_hidden=512, teacher_layers=5)
SMALL_VOCAB_SIZE = 4096
DEEP = replace(FULL, layers=8)
"""Where packing is compared: as in models of some billion parameters, layers cost several times as
much as the head, which has no padding in either case."""
ANSWERS = Answers(
    num_samples=2400, median_tokens=120, sigma=0.9, prompt_tokens=40, k=64, vocab_size=VOCAB_SIZE
)
QUICK_SAMPLES, LOADER_SAMPLES = 600, 9000
PLAIN_SAMPLES = 8
"""Samples of a plainly padded micro-batch, the default of transformers' trainer; packed ones have
as many mean lengths."""
TRL_FULL = Distillation(num_samples=120, num_heldout=16, vocab_size=VOCAB_SIZE)
TRL_QUICK = replace(TRL_FULL, num_samples=24, num_heldout=8)
PHASES = ("imports", "labels", "plan", "model", "deepspeed", "first batch", "first step")
NOTES = (
    "Labels: made up, log-normal response lengths (median 120 tokens, sigma 0.9), prompts of 40, "
    f"k = 64 of {VOCAB_SIZE}. Student: Llama, bfloat16, DeepSpeed stage 0, AdamW, one process.",
    "Hybrid: 0.9 forward KL and 0.1 cross-entropy; its steps read, verify and decode their labels, "
    "those of cross-entropy have tokens in memory. Fused cross-entropy: our kernel without a soft "
    "term, and our metrics. Plain: `model(labels=...)` of transformers, which takes logits of "
    "every position, prompts included, and casts them to float32.",
    "Online: a Llama of about ten times the student's parameters runs forward on the same tokens, "
    "then TAID over the vocabulary as in its authors' code.",
    "Plain padding: 8 samples at a time in a random order, padded to their longest, as trainers of "
    "TRL and transformers do by default. Our padded mode puts like lengths together. "
    "For these lines the student has 8 layers of 256 and a vocabulary of 4096, so that layers cost "
    "several times as much as the head, as in large models.",
    "Loader: plan, read, verify, decode and collate in one thread, epoch after epoch; decode: all "
    "columns of the same shards to numpy, verified, nothing kept. The first epoch of a process is "
    "slower than those that the goal is about: it touches its memory for the first time.",
    "TRL: one epoch of each in a process of its own, float32, the same weights, samples, learning "
    "rate and AdamW; KL(teacher, student) over the vocabulary with the teacher in the loop (GKD, "
    "beta 0, lmbda 0), padded batches of 4 samples; ours from k = 64 and the tail, packed, as many "
    "tokens a step, no more steps. Tokens of prompts count, padding does not. The teacher has "
    "random weights and Zipf distributed words; held-out KL is over the vocabulary for both.",
)


def training(sizes: Sizes, packing: str = "first_fit", epochs: int = 1) -> TrainConfig:
    """Settings of the steps that are timed."""
    batch = BatchConfig.model_validate(
        {"tokens": 8 * sizes.micro_tokens, "micro_tokens": sizes.micro_tokens, "packing": packing}
    )
    return TrainConfig(model="", batch=batch, epochs=epochs)


def micro_batches(reader: LabelReader, plan: TrainingPlan, *, packed: bool) -> Iterator[MicroBatch]:
    """All micro-batches of a training, made when they are asked for."""
    for step in range(len(plan)):
        for group in plan.rounds(step, 0, 1):
            samples = [sample for _, part in group or () for sample in part]
            yield collate(reader.ranges(samples), "sampled", reader.spec, packed=packed)


# -- the step -------------------------------------------------------------------------------------
def step_goals(reader: LabelReader, contenders: Contenders, rounds: int) -> list[harness.Goal]:
    """Hybrid from the cache against cross-entropy and against a teacher in the loop."""
    plan = plan_training(reader, training(contenders.sizes, epochs=rounds + 1))
    # the same micro-batches for all; only the hybrid's are read from the shards as it goes
    kept = list(islice(micro_batches(reader.fork(), plan, packed=True), rounds + 1))
    batches = {kind: iter(kept) for kind in KINDS}
    batches["hybrid"] = micro_batches(reader, plan, packed=True)

    def steps(kind: str) -> None:
        contenders.step(next(batches[kind]), kind)

    times = harness.interleaved({kind: partial(steps, kind) for kind in KINDS}, rounds=rounds)
    found = []
    for kind, name in (("fused", "fused cross-entropy"), ("plain", "cross-entropy, transformers")):
        ratio = times.ratio("hybrid", kind)
        ok = ratio.median <= MOST_TIME
        note = f"{times.of('hybrid').text(' s')} a micro-batch"
        found.append(
            harness.Goal(f"step, hybrid against {name}", "<= 1.10x", ratio.text("x"), ok, note)
        )
    online = times.ratio("online", "hybrid")
    found.append(
        harness.Goal(
            "step, teacher in the loop against hybrid",
            ">= 3x",
            online.text("x"),
            online.median >= LEAST_ONLINE,
            f"teacher {contenders.teacher_ratio:.1f}x the student's parameters",
        )
    )
    return found


def memory_goals(source: LabelSource, quick: bool) -> list[harness.Goal]:
    """Peak resident memory of some steps, each kind in a process of its own."""
    peaks = {kind: _child("--peak", source, kind, quick=quick)["mib"] for kind in KINDS}
    text = ", ".join(f"{kind} {peak:.0f}" for kind, peak in peaks.items())
    most = 1.02 * min(peaks["fused"], peaks["plain"])  # two runs of one kind differ by 1 %
    return [
        harness.Goal(
            "memory, hybrid against cross-entropy",
            "no more",
            f"{peaks['hybrid'] / peaks['fused']:.2f}x fused, "
            f"{peaks['hybrid'] / peaks['plain']:.2f}x plain",
            peaks["hybrid"] <= most,
            f"MiB: {text}",
        ),
        harness.Goal(
            "memory, hybrid against a teacher in the loop",
            "<= 1/2",
            f"1/{peaks['online'] / peaks['hybrid']:.1f}",
            2 * peaks["hybrid"] <= peaks["online"],
            "whole processes",
        ),
    ]


# -- packing --------------------------------------------------------------------------------------
def packing_goals(scratch: Path, rounds: int) -> list[harness.Goal]:
    """Tokens per second of packed rows against two ways of padding, on the same samples."""
    answers = replace(ANSWERS, num_samples=QUICK_SAMPLES, vocab_size=SMALL_VOCAB_SIZE)
    reader = LabelReader(answers.write(scratch / "packing"))
    contenders = Contenders(DEEP, SMALL_VOCAB_SIZE, online=False)
    contenders.start()
    mean = float(reader.num_tokens.mean())
    micro_tokens = round(PLAIN_SAMPLES * mean)
    order = torch.randperm(reader.num_samples, generator=torch.Generator().manual_seed(0)).tolist()
    chosen = order[: 2 * PLAIN_SAMPLES]
    tokens = int(reader.num_tokens[chosen].sum())
    groups: dict[str, list[Sequence[int]]] = {
        "packed": list(_filled(chosen, reader, micro_tokens)),
        "plain padding": [
            chosen[first : first + PLAIN_SAMPLES] for first in range(0, len(chosen), PLAIN_SAMPLES)
        ],
        "padded, like lengths": list(split_by_padded_size(chosen, reader.num_tokens, micro_tokens)),
    }

    def epoch(name: str) -> None:
        for group in groups[name]:
            batch = collate(reader.ranges(group), "sampled", reader.spec, packed=name == "packed")
            contenders.step(batch, "hybrid", update=False)

    times = harness.interleaved({name: partial(epoch, name) for name in groups}, rounds=rounds)
    plain, grouped = (times.ratio(name, "packed") for name in list(groups)[1:])
    rate = times.rate("packed", tokens / 1e3).text(" k token/s")
    return [
        harness.Goal(
            "packed against plain padding",
            ">= 1.8x",
            plain.text("x"),
            plain.median >= LEAST_PACKED,
            f"{rate}, micro-batches of {micro_tokens}",
        ),
        harness.Goal("packed against our padded mode", "", grouped.text("x"), None),
    ]


def _filled(chosen: list[int], reader: LabelReader, micro_tokens: int) -> Iterator[list[int]]:
    """Samples in their order, as many as fit into a packed micro-batch."""
    group: list[int] = []
    for sample in chosen:
        if group and reader.num_tokens[[*group, sample]].sum() > micro_tokens:
            yield group
            group = []
        group.append(sample)
    yield group


# -- the loader -----------------------------------------------------------------------------------
def loader_goals(source: LabelSource, rounds: int) -> list[harness.Goal]:
    """Packed, verified micro-batches against decoding the same shards."""
    reader = LabelReader(source)
    train = TrainConfig(model="", epochs=1)
    reader.hold(train.batch.lanes, LoaderConfig().memory_mib * 2**20)
    plan = plan_training(reader, train)
    rows = int(reader.num_rows.sum()) / 1e6

    def load() -> None:
        for _ in micro_batches(reader, plan, packed=True):
            pass

    started = time.process_time()
    load()
    cold = rows / (time.process_time() - started)
    times = harness.interleaved({"load": load, "decode": partial(_decode, source)}, rounds=rounds)
    share = times.ratio("decode", "load")
    return [
        harness.Goal(
            "loader against decoding",
            ">= 0.5x",
            share.text("x"),
            share.median >= LEAST_LOADER,
            f"{times.rate('load', rows).text(' M token/s')}; decoding "
            f"{times.rate('decode', rows).text(' M token/s')}",
        ),
        harness.Goal("loader, first epoch of a process", "", f"{cold:.2f} M token/s", None),
    ]


def _decode(source: LabelSource) -> None:
    """All columns of all shards to numpy, verified."""
    labels = LabelStore(source.store).open(source.label_set)
    kind, scalars = label_kind(labels.spec.kind), scalar_columns(labels.spec.columns)
    for shard in labels.live_shards():
        for batch in labels.open_table(shard, "labels").batches():
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            kind.decode(columns)
            for name in (*(field.name for field in SCALAR_FIELDS), *scalars):
                columns[name].to_numpy()


def wait_goals(reader: LabelReader, contenders: Contenders, count: int) -> list[harness.Goal]:
    """Share of the time of real steps in which they wait for a micro-batch."""
    plan = plan_training(reader, training(contenders.sizes))
    stream = BatchStream(
        reader,
        plan,
        first_step=0,
        rank_of_world=(0, 1),
        collate=partial(collate, hard="sampled", spec=reader.spec, packed=True),
        loader=LoaderConfig(),
    )
    with stream:
        contenders.step(stream.next(), "hybrid")
        started, waited = time.perf_counter(), stream.waited_s
        for _ in range(count):
            contenders.step(stream.next(), "hybrid")
        share = (stream.waited_s - waited) / (time.perf_counter() - started)
    return [
        harness.Goal(
            "share of step time waiting for data",
            "< 2 %",
            f"{100 * share:.2f} %",
            share < MOST_WAIT,
            f"{count} micro-batches, 1 loader thread",
        )
    ]


# -- against TRL ----------------------------------------------------------------------------------
def trl_goals(scratch: Path, quick: bool) -> list[harness.Goal]:
    """One epoch of ours and of TRL's, each in a process of its own."""
    names = ("TRL's GKD trainer, time per token", "TRL's GKD trainer, held-out KL")
    wanted = ("ours faster", f"ours <= {MOST_KL:.2f}x")
    if not has_trl():
        missing = "trl is not installed"
        return [harness.Goal(*both, missing, None) for both in zip(names, wanted, strict=True)]
    sizes = TRL_QUICK if quick else TRL_FULL
    started = time.process_time()
    source = sizes.write(scratch / "taught")
    label_s = time.process_time() - started
    found = {name: _child("--training", source, name, quick=quick) for name in TRAININGS}
    ours, theirs = found["ours"], found["TRL"]
    faster, worse = theirs["seconds"] / ours["seconds"], ours["kl"] / theirs["kl"]
    rates = ", ".join(f"{name} {one['tokens'] / one['seconds']:.0f}" for name, one in found.items())
    steps = ", ".join(f"{name} {one['steps']:.0f}" for name, one in found.items())
    return [
        harness.Goal(
            names[0],
            wanted[0],
            f"{faster:.1f}x",
            faster > 1,
            f"trl {version('trl')}; token/s: {rates}; labels, made once, "
            f"{ours['tokens'] / label_s:.0f}; teacher {sizes.teacher_ratio:.1f}x the student",
        ),
        harness.Goal(
            names[1],
            wanted[1],
            f"{worse:.2f}x",
            worse <= MOST_KL,
            f"nats: untrained {ours['kl_before']:.3f}, ours {ours['kl']:.3f}, TRL "
            f"{theirs['kl']:.3f} after {ours['tokens']:.0f} tokens; steps: {steps}",
        ),
    ]


# -- start-up -------------------------------------------------------------------------------------
def startup_goals(source: LabelSource, quick: bool) -> list[harness.Goal]:
    """From command to first step, with files in the page cache."""
    _child("--startup", source, "hybrid", quick=quick)
    found = _child("--startup", source, "hybrid", quick=quick)
    parts = ", ".join(f"{phase} {found[phase]:.2f}" for phase in PHASES)
    total = f"{sum(found.values()):.1f} s"
    return [harness.Goal("start-up, command to first step", "", total, None, parts)]


def measure_startup(source: LabelSource, sizes: Sizes, started: float) -> dict[str, float]:
    """Seconds of every phase in this process."""
    moments = [started, time.time()]

    def done() -> None:
        moments.append(time.time())

    reader = LabelReader(source)
    done()
    plan = plan_training(reader, training(sizes))
    done()
    contenders = Contenders(sizes, VOCAB_SIZE, online=False)
    done()
    contenders.start()
    done()
    batch = next(micro_batches(reader, plan, packed=True))
    done()
    contenders.step(batch, "hybrid")
    done()
    return {
        phase: stop - start
        for phase, start, stop in zip(PHASES, moments[:-1], moments[1:], strict=True)
    }


def measure_peak(source: LabelSource, sizes: Sizes, kind: str) -> dict[str, float]:
    """Peak resident memory of three steps in this process."""
    reader = LabelReader(source)
    plan = plan_training(reader, training(sizes))
    contenders = Contenders(sizes, VOCAB_SIZE, online=kind == "online")
    contenders.start()
    stream = micro_batches(reader, plan, packed=True)
    for _ in range(3):
        contenders.step(next(stream), kind)
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return {"mib": int(line.split()[1]) / 1024}


def _child(flag: str, source: LabelSource, kind: str, *, quick: bool) -> dict[str, float]:
    """What this script prints in a process of its own, in its last line."""
    arguments = [flag, kind, "--source", source.model_dump_json(), "--started", repr(time.time())]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, *(["--quick"] if quick else [])],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure, print and write the page."""
    parser = harness.argument_parser(__doc__)
    for flag in ("--peak", "--startup", "--training", "--source"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    sizes = QUICK if arguments.quick else FULL
    if arguments.source:
        source = LabelSource.model_validate_json(arguments.source)
        if arguments.training:
            distillation = TRL_QUICK if arguments.quick else TRL_FULL
            found = asdict(distillation.run(arguments.training, source))
        elif arguments.peak:
            found = measure_peak(source, sizes, arguments.peak)
        else:
            found = measure_startup(source, sizes, arguments.started)
        print(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        return harness.report(measure_all(Path(scratch), sizes, arguments.quick), notes=NOTES)


def measure_all(scratch: Path, sizes: Sizes, quick: bool) -> list[harness.Goal]:
    """Every line of the table."""
    few = replace(ANSWERS, num_samples=QUICK_SAMPLES) if quick else ANSWERS
    source = few.write(scratch / "labels")
    many = few if quick else replace(ANSWERS, num_samples=LOADER_SAMPLES)
    goals = trl_goals(scratch, quick)
    goals += loader_goals(source if quick else many.write(scratch / "many"), harness.MIN_ROUNDS)
    goals += startup_goals(source, quick)
    goals += memory_goals(source, quick)
    reader = LabelReader(source)
    contenders = Contenders(sizes, VOCAB_SIZE, online=True)
    contenders.start()
    goals += step_goals(reader, contenders, harness.MIN_ROUNDS)
    goals += packing_goals(scratch, harness.MIN_ROUNDS)
    goals += wait_goals(reader, contenders, 10 if quick else 40)
    return goals


if __name__ == "__main__":
    sys.exit(main())
