"""Train students from cached labels under Ray Train, with DeepSpeed inside."""

import importlib
import json
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.cluster import Cluster, unwrapped
from pipeline.project import Project, teacher_forward_tokens
from pipeline.steps.plan import Plan
from pipeline.steps.prepare import PreparedModel, PreparedTeacher
from pipeline.text import kind_text
from storage.errors import DistillError
from storage.files import write_atomically
from storage.keys import key_of
from student_train.config import (
    METRICS_FILE,
    MODEL_DIRECTORY,
    LabelSource,
    TrainConfig,
    TrainJob,
)
from student_train.label_sources import require_fit_labels, resolve_labels

RESULT_FILE = "student.json"
RAY_TRAIN_RESOURCES = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
"""Ray Train's names of the shares that Ray's own options call otherwise."""
POLL_S = 0.5
MAX_FAILURES = 2
"""Restarts of a training whose worker died; it resumes from its last checkpoint."""


@dataclass(frozen=True, slots=True)
class StudentRequest:
    """A student that the project wants."""

    name: str
    train: TrainConfig
    untrained: PreparedModel


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
    was_published: bool = True
    """Whether it was there before this run."""

    @property
    def model(self) -> str:
        """Directory of the exported model."""
        return str(self.directory / MODEL_DIRECTORY)


def train_students(
    project: Project,
    requests: Sequence[StudentRequest],
    *,
    plan: Plan,
    teacher: PreparedTeacher,
    cluster: Cluster,
) -> list[TrainedStudent]:
    """Train the students that are not published yet; returns all, in the given order.

    They are trained one after the other by the same processes, whose start costs more than a small
    student. Each is published by itself, so a crash loses at most the one in training, and that
    one goes on from its last checkpoint.
    """
    places = {request.name: _place(project, request, plan) for request in requests}
    missing = unpublished(project, requests, plan)
    names = [request.name for request in missing]
    if missing:
        jobs = [
            _job(project, request, plan, teacher, places[request.name][1], cluster)
            for request in missing
        ]
        before = teacher_forward_tokens(project.events())
        with project.timed("train", students=names) as cost:
            with _progress_bars(project, dict(zip(names, jobs, strict=True))):
                _fit(project, jobs, cluster)
            cost["teacher_forward_tokens"] = teacher_forward_tokens(project.events()) - before
            results = [
                _publish(project, request, *places[request.name], plan, cost) for request in missing
            ]
            cost["trained_tokens"] = sum(result["trained_tokens"] for result in results)
    students = published_students(project, requests, plan)
    return [replace(student, was_published=student.name not in names) for student in students]


def published_students(
    project: Project, requests: Sequence[StudentRequest], plan: Plan
) -> list[TrainedStudent]:
    """Students that are there, in the given order."""
    students = []
    for request in requests:
        key, directory = _place(project, request, plan)
        result = json.loads((directory / RESULT_FILE).read_text())
        students.append(TrainedStudent(request.name, key, directory, request.untrained, result))
    return students


def unpublished(
    project: Project, requests: Sequence[StudentRequest], plan: Plan
) -> list[StudentRequest]:
    """The students that are not there yet."""
    return [r for r in requests if not (_place(project, r, plan)[1] / RESULT_FILE).is_file()]


def remove_students(project: Project, requests: Sequence[StudentRequest], plan: Plan) -> None:
    """Let students be trained anew; settings, labels and seed are the same, so is what comes."""
    for request in requests:
        _, directory = _place(project, request, plan)
        (directory / RESULT_FILE).unlink(missing_ok=True)  # half a student is none
        shutil.rmtree(directory, ignore_errors=True)


def _place(project: Project, request: StudentRequest, plan: Plan) -> tuple[str, Path]:
    """Key and folder of a student.

    The key covers everything that decides what it becomes: settings, initial weights, labels and
    selection.
    """
    key = key_of(
        {
            "train": request.train.deciding(),
            "untrained": request.untrained.fingerprint,
            "label_set": plan.spec.key,
            "selection": plan.selection_keys["train"],
        }
    )
    return key, project.directory / "students" / f"{request.name}-{key[:12]}"


def _publish(
    project: Project,
    request: StudentRequest,
    key: str,
    directory: Path,
    plan: Plan,
    cost: dict[str, Any],
) -> dict[str, Any]:
    """Write ``student.json``: the student exists from here on."""
    metrics = _metrics(directory / METRICS_FILE)
    result = {
        "name": request.name,
        "key": key,
        "train": request.train.model_dump(mode="json"),
        "untrained": request.untrained.key,
        "label_set": plan.spec.key,
        "selection": plan.selection_keys["train"],
        "steps": len(metrics),
        "trained_tokens": sum(m["tokens"] for m in metrics),
        "seconds": round(sum(m["seconds"] for m in metrics), 2),
        "teacher_forward_tokens": cost["teacher_forward_tokens"],
        "final": metrics[-1],
    }
    write_atomically(directory / RESULT_FILE, json.dumps(result, indent=1).encode())
    return result


def _job(
    project: Project,
    request: StudentRequest,
    plan: Plan,
    teacher: PreparedTeacher,
    directory: Path,
    cluster: Cluster,
) -> TrainJob:
    """The job of one student, also written to ``job.json`` for a run without Ray."""
    train, untrained = request.train, request.untrained
    sampling = plan.spec.generation.sampling
    card = {
        "student": f"{project.config.name}/{request.name}",
        "untrained student": f"{train.model}, fingerprint {untrained.key}",
        "teacher": f"{project.config.teacher.model}, fingerprint {teacher.model.key}",
        "label set": plan.spec.key,
        "labels": (
            f"{plan.spec.generation.mode}, {kind_text(plan.spec)}, "
            f"columns {', '.join(map(str, plan.spec.columns)) or 'none'}"
        ),
        "sampling": "given responses" if sampling is None else sampling.model_dump_json(),
        "selection": plan.selection_keys["train"],
        "loss": train.loss.model_dump_json(),
        "optimizer": train.optimizer.model_dump_json(),
        **(project.read_json("provenance.json") or {}),
    }
    card.pop("host", None)
    own = LabelSource(
        store=project.store_uri,
        label_set=plan.spec.key,
        selection=plan.selection_keys["train"],
    )
    labels, *mixture = resolve_labels(own, train.data)
    require_fit_labels(mixture)  # the project's own were looked at before anything was prepared
    job = TrainJob(
        labels=labels,
        mixture=tuple(mixture),
        model=untrained.directory,
        tokenizer=teacher.model.directory,
        train=train,
        output=str(directory),
        card=card,
        threads=cluster.student_threads,
    )
    write_atomically(directory / "job.json", job.model_dump_json(indent=1).encode())
    return job


def _train_loop(config: dict[str, list[str]]) -> None:
    """What every Ray Train worker runs; Ray has set the ranks."""
    from student_train.trainer import train_student

    for text in config["jobs"]:
        train_student(TrainJob.model_validate_json(text))


def _fit(project: Project, jobs: list[TrainJob], cluster: Cluster) -> None:
    cluster.require_cpus(
        project.config.cluster.student_workers,
        cluster.student_threads,
        "cluster.student_workers and cluster.student_threads",
    )
    ray: Any = cluster.ray
    importlib.import_module("ray.train.torch")  # an attribute of ray from here on
    config = project.config.cluster
    use_gpu = config.gpus_per_worker > 0
    share = cluster.options(threads=cluster.student_threads, gpus=config.gpus_per_worker)
    # our checkpoints are in the run folder; Ray keeps its own bookkeeping here until it is done
    bookkeeping = project.directory / ".ray"
    trainer = ray.train.torch.TorchTrainer(
        _train_loop,
        train_loop_config={"jobs": [job.model_dump_json() for job in jobs]},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.student_workers,
            use_gpu=use_gpu,
            resources_per_worker={
                name: share[option]
                for name, option in RAY_TRAIN_RESOURCES.items()
                if share.get(option)
            },
        ),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=str(bookkeeping),
            failure_config=ray.train.FailureConfig(
                max_failures=MAX_FAILURES, controller_failure_limit=1
            ),
            worker_runtime_env=share["runtime_env"],
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
def _progress_bars(project: Project, jobs: dict[str, TrainJob]) -> Iterator[None]:
    """Show every training from the lines that it writes, until the block ends."""
    finished = threading.Event()
    with project.bars() as bars, project.console.status("starting the trainer") as status:

        def show() -> None:
            for name, job in jobs.items():
                metrics = _metrics(Path(job.output) / METRICS_FILE)
                if metrics:
                    status.stop()
                    last = metrics[-1]
                    loss = f"loss {last['loss']:.3f}"
                    bars.show(f"training {name}", last["step"], last["total_steps"], loss)

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
