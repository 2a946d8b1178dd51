"""Train one student from cached labels under Ray Train, with DeepSpeed inside."""

import importlib
import json
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.cluster import QUIET_ENVIRONMENT, Cluster, unwrapped
from pipeline.project import Project, teacher_forward_tokens
from pipeline.steps.plan import Plan
from pipeline.steps.prepare import PreparedModel, PreparedTeacher
from storage.errors import DistillError
from storage.files import write_atomically
from storage.keys import key_of
from student_train.config import LabelSource, TrainConfig, TrainJob

RESULT_FILE = "student.json"
METRICS_FILE = "metrics.jsonl"
MODEL_DIRECTORY = "model"
POLL_S = 0.5
MAX_FAILURES = 2
"""Restarts of a training whose worker died; it resumes from its last checkpoint."""


@dataclass(frozen=True, slots=True)
class TrainedStudent:
    """A published student."""

    name: str
    key: str
    directory: Path
    """Folder with ``model/``, ``metrics.jsonl`` and ``student.json``."""
    untrained: PreparedModel
    result: dict[str, Any]
    """Content of ``student.json``."""
    was_published: bool
    """Whether it was there before this run."""

    @property
    def model(self) -> str:
        """Directory of the exported model."""
        return str(self.directory / MODEL_DIRECTORY)


def train_student(
    project: Project,
    name: str,
    train: TrainConfig,
    *,
    plan: Plan,
    teacher: PreparedTeacher,
    untrained: PreparedModel,
    cluster: Cluster,
) -> TrainedStudent:
    """Train a student, or return it if the same one is published.

    Its key covers everything that decides what it becomes: settings, initial weights, labels and
    selection.
    """
    key = key_of(
        {
            "train": train.model_dump(mode="json", exclude={"checkpoint_every_steps", "model"}),
            "untrained": untrained.fingerprint,
            "label_set": plan.spec.key,
            "selection": plan.selection_keys["train"],
        }
    )
    directory = project.directory / "students" / f"{name}-{key[:12]}"
    result = project.read_json(f"students/{directory.name}/{RESULT_FILE}")
    if result is not None:
        return TrainedStudent(name, key, directory, untrained, result, was_published=True)
    before = teacher_forward_tokens(project.events())
    job = _job(project, name, train, plan, teacher, untrained, directory, cluster.student_threads)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "job.json", job.model_dump_json(indent=1).encode())
    with project.timed("train", student=name) as cost:
        with _progress_bar(project, name, directory / METRICS_FILE):
            _fit(project, job, cluster)
        metrics = _metrics(directory / METRICS_FILE)
        cost["teacher_forward_tokens"] = teacher_forward_tokens(project.events()) - before
        cost["trained_tokens"] = sum(m["tokens"] for m in metrics)
    result = {
        "name": name,
        "key": key,
        "train": train.model_dump(mode="json"),
        "label_set": plan.spec.key,
        "selection": plan.selection_keys["train"],
        "steps": len(metrics),
        "trained_tokens": sum(m["tokens"] for m in metrics),
        "seconds": round(sum(m["seconds"] for m in metrics), 2),
        "teacher_forward_tokens": cost["teacher_forward_tokens"],
        "final": metrics[-1],
    }
    project.write_json(f"students/{directory.name}/{RESULT_FILE}", result)
    return TrainedStudent(name, key, directory, untrained, result, was_published=False)


def _job(
    project: Project,
    name: str,
    train: TrainConfig,
    plan: Plan,
    teacher: PreparedTeacher,
    untrained: PreparedModel,
    directory: Path,
    threads: int,
) -> TrainJob:
    card = {
        "student": f"{project.config.name}/{name}",
        "untrained student": f"{train.model!r}, fingerprint {untrained.key}",
        "teacher": f"{project.config.teacher.model!r}, fingerprint {teacher.model.key}",
        "label set": plan.spec.key,
        "labels": f"{plan.spec.generation.mode}, {plan.spec.kind!r}, columns {plan.spec.columns}",
        "sampling": repr(plan.spec.generation.sampling),
        "selection": plan.selection_keys["train"],
        "loss": train.loss.model_dump_json(),
        "optimizer": train.optimizer.model_dump_json(),
        **(project.read_json("provenance.json") or {}),
    }
    card.pop("host", None)
    return TrainJob(
        labels=LabelSource(
            store=project.store_uri,
            label_set=plan.spec.key,
            selection=plan.selection_keys["train"],
        ),
        model=untrained.directory,
        tokenizer=teacher.model.directory,
        train=train,
        output=str(directory),
        card=card,
        threads=threads,
    )


def _train_loop(job_json: dict[str, str]) -> None:
    """What every Ray Train worker runs; Ray has set the ranks."""
    from student_train.trainer import train_student as train

    train(TrainJob.model_validate_json(job_json["job"]))


def _fit(project: Project, job: TrainJob, cluster: Cluster) -> None:
    ray: Any = cluster.ray
    importlib.import_module("ray.train.torch")  # an attribute of ray from here on
    config = project.config.cluster
    use_gpu = config.gpus_per_worker > 0
    # our checkpoints are in the run folder; Ray keeps its own bookkeeping here until it is done
    bookkeeping = project.directory / ".ray"
    trainer = ray.train.torch.TorchTrainer(
        _train_loop,
        train_loop_config={"job": job.model_dump_json()},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.student_workers,
            use_gpu=use_gpu,
            resources_per_worker={
                "CPU": job.threads,
                **({"GPU": config.gpus_per_worker} if use_gpu else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=f"{Path(job.output).name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(bookkeeping),
            failure_config=ray.train.FailureConfig(
                max_failures=MAX_FAILURES, controller_failure_limit=1
            ),
            worker_runtime_env={
                "env_vars": {**QUIET_ENVIRONMENT, "OMP_NUM_THREADS": str(job.threads)}
            },
        ),
    )
    try:
        trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise _cause(error) from error
    finally:
        shutil.rmtree(bookkeeping, ignore_errors=True)


def _cause(error: BaseException) -> BaseException:
    """A worker's own failure where the user can fix it; the whole error otherwise."""
    for failure in getattr(error, "worker_failures", {}).values():
        found = unwrapped(failure)
        if isinstance(found, DistillError):
            return found
    return unwrapped(error)


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().split("\n") if line.endswith("}")]


@contextmanager
def _progress_bar(project: Project, name: str, path: Path) -> Iterator[None]:
    """Show the training from the lines that it writes, until the block ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    finished = threading.Event()
    with Progress(*columns, console=project.console) as progress:
        bar = progress.add_task(f"starting {name}", total=None, loss="")

        def show() -> None:
            metrics = _metrics(path)
            if metrics:
                last = metrics[-1]
                progress.update(
                    bar,
                    description=f"training {name}",
                    total=last["total_steps"],
                    completed=last["step"],
                    loss=f"loss {last['loss']:.3f}",
                )

        def watch() -> None:
            while not finished.wait(POLL_S):
                show()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
            show()
