"""The training loop. One call per rank; a launcher (Ray Train, torchrun, none) sets the ranks."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from storage.keys import key_of
from student_train.checkpoint import Checkpoints
from student_train.config import METRICS_FILE, MODEL_DIRECTORY, TrainJob
from student_train.data import LabelReader, StepPlan, collate, plan_epoch
from student_train.engine import initialize, prepare_process, sum_over_ranks, world
from student_train.export import export_student
from student_train.losses.base import LossTerms
from student_train.model import Student, load_causal_lm
from student_train.preflight import check_labels_serve_loss, check_student_fits_labels
from student_train.schedules import learning_rate
from student_train.step_clock import StepClock

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
    reader = LabelReader(job.labels, job.train.loss.weight)
    check_labels_serve_loss(job.train.loss, reader)
    check_student_fits_labels(job.model, job.tokenizer, reader)
    plans = [plan for epoch in range(job.train.epochs) for plan in _plan(reader, job, epoch)]
    # float32 weights in every case: DeepSpeed makes the bfloat16 copy and keeps the masters
    language_model = load_causal_lm(job.model, "float32")
    student = Student(language_model, job.train.loss, reader.vocab_size)
    engine = initialize(student, job.train)
    training = _Training(job, reader, plans, student, engine)
    rank, world_size = world()
    checkpoints = Checkpoints(
        output / CHECKPOINTS_DIRECTORY,
        {"job": key_of([job.train, job.labels, job.model]), "world_size": str(world_size)},
    )
    first = checkpoints.load(engine)
    training.clock.restore(checkpoints.state)
    log = MetricsLog(output / METRICS_FILE, first) if rank == 0 else None
    for step in range(first, len(plans)):
        metrics = training.step(step)
        if log is not None:
            log.add(metrics)
        done = step + 1
        if done % job.train.checkpoint_every_steps == 0 and done < len(plans):
            checkpoints.save(engine, done, rank, training.clock.state())
    if rank == 0:
        facts = {
            **job.card,
            "samples": str(len(reader.selection.requests)),
            "supervised tokens per epoch": str(int(reader.num_rows.sum())),
            "epochs": str(job.train.epochs),
            "optimizer steps": str(len(plans)),
        }
        export_student(
            student.language_model,
            source=Path(job.model),
            output=output / MODEL_DIRECTORY,
            card=facts,
        )
        checkpoints.remove()
    torch.distributed.barrier()


def _plan(reader: LabelReader, job: TrainJob, epoch: int) -> list[StepPlan]:
    return plan_epoch(
        reader.num_rows, reader.num_tokens, job.train.batch, seed=job.train.seed, epoch=epoch
    )


class _Training:
    """Everything that an optimiser step needs."""

    def __init__(
        self,
        job: TrainJob,
        reader: LabelReader,
        plans: list[StepPlan],
        student: Student,
        engine: Any,
    ) -> None:
        self._train, self._reader, self._plans = job.train, reader, plans
        self._student, self._engine = student, engine
        self.clock = StepClock(job.train.loss, len(plans))

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step over all ranks; returns its globally reduced metrics."""
        started = time.perf_counter()
        plan = self._plans[step]
        rank, world_size = world()
        lr = learning_rate(self._train.optimizer, step, len(self._plans))
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        # DeepSpeed averages over ranks; times the world size over the global count is the mean
        scale = world_size / plan.num_supervised
        at_start = self.clock.now(step)
        sums = dict.fromkeys((*COMMON_METRICS, *self._train.loss.metrics), 0.0)
        rounds = list(_rounds(plan, rank, world_size))
        waited = 0.0
        for number, indices in enumerate(rounds):
            self._engine.set_gradient_accumulation_boundary(number == len(rounds) - 1)
            if indices is None:
                self._engine.backward(self._student.anchor())
            else:
                before = time.perf_counter()
                batch = collate(
                    self._reader.read(indices), self._train.loss.hard, self._reader.spec
                ).to(self._engine.device)
                waited += time.perf_counter() - before
                terms = self._engine(batch, self.clock.now(step))
                self._engine.backward(terms.total * scale)
                found = _sums(terms, batch.labels.topk_ids_MK[:, 0])
                self.clock.after_micro_batch(found["soft"], len(batch.labels), step=step)
                for name in sums:
                    sums[name] += found[name]
            self._engine.step()
        totals = sum_over_ranks({**sums, "data_wait_s": waited})
        self.clock.after_step(totals["soft"], plan.num_supervised, step=step)
        return {
            "step": step + 1,
            "total_steps": len(self._plans),
            "lr": lr,
            **({} if at_start.t is None else {"t": at_start.t}),
            **{name: totals[name] / plan.num_supervised for name in sums},
            "supervised_tokens": plan.num_supervised,
            "tokens": plan.num_tokens,
            "seconds": time.perf_counter() - started,
            "data_wait_s": totals["data_wait_s"] / world_size,
        }


def _rounds(plan: StepPlan, rank: int, world_size: int) -> Iterator[tuple[int, ...] | None]:
    """This rank's micro-batches; None where other ranks still have one, so all step together."""
    for start in range(0, len(plan.micro_batches), world_size):
        place = start + rank
        yield plan.micro_batches[place] if place < len(plan.micro_batches) else None


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
