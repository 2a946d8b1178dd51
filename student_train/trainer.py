"""The training loop. One call per rank; a launcher (Ray Train, torchrun, none) sets the ranks."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from student_train.checkpoints.checkpoint import Checkpoints, SavedStep, remove_checkpoints
from student_train.config import METRICS_FILE, MODEL_DIRECTORY, TrainConfig, TrainJob
from student_train.engine import initialize, prepare_process, start_process_group, world
from student_train.errors import PreflightError, TrainingStoppedError
from student_train.models.export import export_student
from student_train.models.flops import model_flops
from student_train.models.student import Student, make_student
from student_train.optimizer_step import OptimizerStep
from student_train.preflight.before_training import require_fit_job
from student_train.step_clock import StepClock
from student_train.stopping import StopRequest
from student_train.streaming.order import draw_members
from student_train.streaming.reader import LabelReader, collate
from student_train.streaming.step_plan import TrainingPlan
from student_train.streaming.stream import BatchStream
from student_train.watching.best import BEST_DIRECTORY
from student_train.watching.heldout import check_heldout
from student_train.watching.trackers.base import require_trackers
from student_train.watching.watch import Watch


def train_student(
    job: TrainJob, *, progress: bool = False, should_stop: Callable[[], bool] | None = None
) -> None:
    """Train one student from cached labels and export it to ``<output>/model``.

    Does nothing where the model is exported already, and resumes from the last checkpoint of the
    same job. Each optimiser step adds one line to ``metrics.jsonl``: sums over all ranks divided
    by the global number of supervised tokens.

    Args:
        job: What to train.
        progress: Whether rank 0 shows how far the training is, on stderr.
        should_stop: Asked after every optimiser step on every rank; one rank that is told so, or
            got SIGTERM, stops all.

    Raises:
        TrainingStoppedError: if it was asked to stop, and has saved a checkpoint.
        PreflightError: if student, labels and loss do not fit.
        NotLabelledError: if the label set lacks samples.
        NonFiniteLossError: if a loss is not finite.
    """
    output = Path(job.output)
    if (output / MODEL_DIRECTORY).is_dir():
        remove_checkpoints(job)
        shutil.rmtree(output / BEST_DIRECTORY, ignore_errors=True)
        return
    prepare_process(job.threads)
    torch.manual_seed(job.train.seed)
    require_trackers(job.train.watch.trackers)
    check_heldout(job)
    reader = open_labels(job)
    require_fit_job(job, reader)
    plan = plan_training(reader, job.train)
    start_process_group()
    checkpoints = Checkpoints(job, plan.digest)
    found = checkpoints.find()
    student, engine = _build(job, reader, universal=found is not None and found.universal)
    with StopRequest(should_stop) as stop:
        training = _Training(job, reader, plan, student, engine, checkpoints=checkpoints, stop=stop)
        if found is not None:
            training.restore(found)
        training.run(progress=progress)
    torch.distributed.barrier()


def open_labels(job: TrainJob) -> LabelReader:
    """The labels of a job."""
    return LabelReader(
        job.labels,
        job.train.loss.weight,
        mixture=job.mixture,
        data=job.train.data,
        loader=job.train.loader,
    )


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


def _build(job: TrainJob, reader: LabelReader, *, universal: bool) -> tuple[Student, Any]:
    """The student and the engine around it, which may load a checkpoint of other ranks."""
    student = make_student(job.model, job.train, reader.vocab_size)
    return student, initialize(student, job.train, universal=universal)


def _check_lanes(train: TrainConfig, world_size: int) -> None:
    if world_size > train.batch.lanes:
        raise PreflightError(
            f"train.batch.lanes is {train.batch.lanes}, but there are {world_size} ranks, and some "
            "would have no samples; set it to a multiple of their number"
        )


class _Training:
    """One training on one rank, from its last checkpoint to the exported student.

    Methods are its phases, in order; every rank calls all of them.
    """

    def __init__(
        self,
        job: TrainJob,
        reader: LabelReader,
        plan: TrainingPlan,
        student: Student,
        engine: Any,
        *,
        checkpoints: Checkpoints,
        stop: StopRequest,
    ) -> None:
        self._job, self._train, self._output = job, job.train, Path(job.output)
        self._reader, self._plan, self._student, self._engine = reader, plan, student, engine
        self._rank, self._world_size = world()
        _check_lanes(self._train, self._world_size)
        self._clock = StepClock(self._train.loss, len(plan))
        self._checkpoints = checkpoints
        self._finished = 0
        self._step = OptimizerStep(
            self._train,
            plan,
            reader,
            engine=engine,
            clock=self._clock,
            flops=model_flops(student.language_model),
            stop=stop,
        )

    def restore(self, found: SavedStep) -> None:
        """Go on from a checkpoint."""
        self._checkpoints.load(self._engine, found)
        self._finished = found.manifest.step
        self._clock.restore(found.manifest.state)

    def run(self, *, progress: bool) -> None:
        """All steps that are not done yet, and the export."""
        watch = Watch(
            self._job,
            engine=self._engine,
            language_model=self._student.language_model,
            export=self._export,
            finished_steps=self._finished,
            total_steps=len(self._plan),
            progress=progress,
        )
        with watch:
            with self._stream() as stream:
                while self._finished < len(self._plan) and not watch.stops:
                    metrics = self._step(self._finished, stream)
                    self._finished += 1
                    watch.after_step(metrics)
                    self._checkpoint(watch)
            if not watch.publish_best(self._finished):
                self._export(self._job, watch.facts, watch.held_out)
        if self._rank == 0:
            self._checkpoints.remove()

    def _export(
        self, job: TrainJob, facts: Mapping[str, str], held_out: Mapping[str, float]
    ) -> None:
        """Write the student of now into the output directory of a job."""
        export_student(
            self._student.language_model,
            job,
            optimizer=self._engine.optimizer,
            facts={
                "samples": str(self._reader.num_samples),
                "supervised tokens per epoch": str(int(self._reader.num_rows.sum())),
                "epochs": str(self._train.epochs),
                "optimizer steps": f"{self._finished} of {len(self._plan)}",
                **facts,
            },
            metrics_file=self._output / METRICS_FILE,
            held_out=held_out,
            write=self._rank == 0,
        )

    def _stream(self) -> BatchStream:
        """The batches of this rank that are still to come."""
        packed = self._train.batch.packing != "padded"
        return BatchStream(
            self._reader,
            self._plan,
            first_step=self._finished,
            rank_of_world=(self._rank, self._world_size),
            collate=partial(
                collate, hard=self._train.loss.hard, spec=self._reader.spec, packed=packed
            ),
            loader=self._train.loader,
        )

    def _checkpoint(self, watch: Watch) -> None:
        """Save where one is due, or the training was asked to stop."""
        done, stops = self._finished, self._step.stops
        if done == len(self._plan):
            return
        if stops or done % self._train.checkpoint.every_steps == 0:
            self._checkpoints.save(self._engine, done, self._clock.state())
            watch.after_checkpoint()
        if stops:
            raise TrainingStoppedError(done, len(self._plan))
