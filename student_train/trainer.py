"""The training loop. One call per rank; a launcher (Ray Train, torchrun, none) sets the ranks."""

import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from storage.keys import key_of
from student_train.checkpoint import Checkpoints
from student_train.config import METRICS_FILE, MODEL_DIRECTORY, TrainConfig, TrainJob
from student_train.data import LabelReader, collate
from student_train.documents import isolate_documents
from student_train.engine import initialize, prepare_process, sum_over_ranks, world
from student_train.errors import PreflightError
from student_train.export import export_student
from student_train.losses.base import LossTerms
from student_train.model import Student, load_causal_lm
from student_train.order import draw_members
from student_train.preflight import check_labels_serve_loss, check_student_fits_labels
from student_train.schedules import learning_rate
from student_train.step_clock import StepClock
from student_train.step_plan import TrainingPlan
from student_train.stream import BatchStream

CHECKPOINTS_DIRECTORY = "checkpoints"

COMMON_METRICS = ("loss", "soft", "hard", "soft_weight", "agreement")
"""What every loss reports; ``loss.metrics`` names the rest."""


def train_student(job: TrainJob) -> None:
    """Train one student from cached labels and export it to ``<output>/model``.

    Does nothing where the model is exported already, and resumes from the last checkpoint of the
    same job. Each optimiser step adds one line to
    ``metrics.jsonl``: sums over all ranks divided by the global number of supervised tokens.

    Raises:
        PreflightError: if student, labels and loss do not fit.
        NotLabelledError: if the label set lacks samples.
        NonFiniteLossError: if a loss is not finite.
    """
    output = Path(job.output)
    if (output / MODEL_DIRECTORY).is_dir():
        shutil.rmtree(output / CHECKPOINTS_DIRECTORY, ignore_errors=True)
        return
    prepare_process(job.threads)
    torch.manual_seed(job.train.seed)
    reader = LabelReader(
        job.labels,
        job.train.loss.weight,
        mixture=job.mixture,
        data=job.train.data,
        loader=job.train.loader,
    )
    check_labels_serve_loss(job.train.loss, reader)
    check_student_fits_labels(job.model, job.tokenizer, reader)
    plan = plan_training(reader, job.train)
    # float32 weights in every case: DeepSpeed makes the bfloat16 copy and keeps the masters
    language_model = load_causal_lm(job.model, "float32")
    student = Student(language_model, job.train.loss, reader.vocab_size)
    if job.train.batch.packing != "padded":
        isolate_documents(language_model)
    engine = initialize(student, job.train)
    rank, world_size = world()
    _check_lanes(job.train, world_size)
    checkpoints = Checkpoints(
        output / CHECKPOINTS_DIRECTORY,
        {
            "job": key_of([job.train.deciding(), job.labels, job.mixture, job.model]),
            # a response that was lost and labelled again has another length
            "plan": plan.digest,
            "world_size": str(world_size),
        },
    )
    clock = StepClock(job.train.loss, len(plan))
    first = checkpoints.load(engine)
    clock.restore(checkpoints.state)
    log = MetricsLog(output / METRICS_FILE, first) if rank == 0 else None
    stream = BatchStream(
        reader,
        plan,
        first_step=first,
        rank_of_world=(rank, world_size),
        collate=partial(
            collate,
            hard=job.train.loss.hard,
            spec=reader.spec,
            packed=job.train.batch.packing != "padded",
        ),
        loader=job.train.loader,
    )
    with stream:
        training = _Training(job, plan, stream, engine, clock)
        for step in range(first, len(plan)):
            metrics = training.step(step)
            if log is not None:
                log.add(metrics)
            done = step + 1
            if done % job.train.checkpoint_every_steps == 0 and done < len(plan):
                checkpoints.save(engine, done, rank, clock.state())
    if rank == 0:
        facts = {
            **job.card,
            "samples": str(reader.num_samples),
            "supervised tokens per epoch": str(int(reader.num_rows.sum())),
            "epochs": str(job.train.epochs),
            "optimizer steps": str(len(plan)),
        }
        export_student(
            student.language_model,
            source=Path(job.model),
            output=output / MODEL_DIRECTORY,
            card=facts,
        )
        checkpoints.remove()
    torch.distributed.barrier()


def plan_training(reader: LabelReader, train: TrainConfig) -> TrainingPlan:
    """All optimiser steps: a function of the settings and the selection alone."""
    members = [
        draw_members(
            reader.source_S,
            reader.weights,
            seed=train.seed,
            epoch=epoch,
            key_order_S=reader.key_order_S,
        )
        for epoch in range(train.epochs)
    ]
    return TrainingPlan(members, reader.num_rows, reader.num_tokens, train.batch, seed=train.seed)


def _check_lanes(train: TrainConfig, world_size: int) -> None:
    if world_size > train.batch.lanes:
        raise PreflightError(
            f"train.batch.lanes is {train.batch.lanes}, but there are {world_size} ranks, and some "
            "would have no samples; set it to a multiple of their number"
        )


class _Training:
    """Everything that an optimiser step needs."""

    def __init__(
        self,
        job: TrainJob,
        plan: TrainingPlan,
        stream: BatchStream,
        engine: Any,
        clock: StepClock,
    ) -> None:
        self._train, self._plan, self._stream = job.train, plan, stream
        self._engine, self._clock = engine, clock

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step over all ranks; returns its globally reduced metrics."""
        started = time.perf_counter()
        plan = self._plan.step(step)
        rank, world_size = world()
        lr = learning_rate(self._train.optimizer, step, len(self._plan))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed averages over ranks; times the world size over the global count is the mean
        scale = world_size / plan.num_supervised
        at_start = self._clock.now(step)
        sums = dict.fromkeys((*COMMON_METRICS, *self._train.loss.metrics), 0.0)
        num_rounds = len(self._plan.rounds(step, rank, world_size))
        waited_before_s = self._stream.waited_s
        for number in range(num_rounds):
            self._engine.set_gradient_accumulation_boundary(number == num_rounds - 1)
            batch = self._stream.next().to(self._engine.device)
            terms = self._engine(batch, self._clock.now(step))
            self._engine.backward(terms.total * (scale if batch.counts else 0.0))
            if batch.counts:
                found = _sums(terms, batch.labels.topk_ids_MK[:, 0])
                self._clock.after_micro_batch(found["soft"], len(batch.labels), step=step)
                for name in sums:
                    sums[name] += found[name]
            self._engine.step()
        waited_s = self._stream.waited_s - waited_before_s
        totals = sum_over_ranks({**sums, "data_wait_s": waited_s})
        self._clock.after_step(totals["soft"], plan.num_supervised, step=step)
        seconds = time.perf_counter() - started
        return {
            "step": step + 1,
            "total_steps": len(self._plan),
            "lr": lr,
            **({} if at_start.t is None else {"t": at_start.t}),
            **{name: totals[name] / plan.num_supervised for name in sums},
            "supervised_tokens": plan.num_supervised,
            "tokens": plan.num_tokens,
            "seconds": seconds,
            "data_wait_s": totals["data_wait_s"] / world_size,
            "data_wait_share": totals["data_wait_s"] / world_size / seconds,
        }


def _sums(terms: LossTerms, teacher_argmax_M: torch.Tensor) -> dict[str, float]:
    """The metrics of a micro-batch, summed over its rows in float64."""
    rows = {
        "soft": terms.soft_M,
        "hard": terms.hard_M,
        "soft_weight": terms.soft_weight_M,
        "agreement": terms.student_argmax_M == teacher_argmax_M,
        **terms.metrics,
    }
    sums = {name: float(values_M.double().sum()) for name, values_M in rows.items()}
    return {"loss": float(terms.total.detach()), **sums}


class MetricsLog:
    """``metrics.jsonl``: one line per optimiser step, each step once, also after a crash.

    Args:
        path: The file.
        finished_steps: Steps that the loaded checkpoint contains; later lines are dropped.
    """

    def __init__(self, path: Path, finished_steps: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_text().splitlines()[:finished_steps] if path.exists() else []
        path.write_text("".join(line + "\n" for line in kept))
        self._path = path

    def add(self, metrics: dict[str, float]) -> None:
        """Append one line; it is visible to readers at once."""
        with self._path.open("a") as stream:
            stream.write(json.dumps(metrics) + "\n")
