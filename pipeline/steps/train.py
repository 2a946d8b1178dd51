"""Train students from cached labels under Ray Train, with DeepSpeed inside."""

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.cluster import Cluster
from pipeline.project import Project, teacher_forward_tokens
from pipeline.steps.plan import Plan
from pipeline.steps.prepare import PreparedModel, PreparedTeacher
from pipeline.steps.student_queue import StudentTraining
from pipeline.steps.student_runs import StudentRuns
from pipeline.stopping import StoppedError
from pipeline.text import kind_text
from storage.errors import DistillError
from storage.files import write_atomically
from storage.keys import key_of
from student_train.config import (
    METRICS_FILE,
    MODEL_DIRECTORY,
    SELECTION_FILE,
    LabelSource,
    TrainConfig,
    TrainJob,
)
from student_train.streaming.label_sources import require_fit_labels, resolve_labels
from student_train.watching.progress import Pace

RESULT_FILE = "student.json"
POLL_S = 0.5
LAST_LINES_BYTES = 2**16
"""Enough to hold the last line of ``metrics.jsonl`` whole."""


class StudentsFailedError(DistillError):
    """Some students could not be trained; the others are published."""


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

    As many at once as the cluster has room for. Each is published as soon as it is trained, so a
    crash loses none of them, and those in training go on from their last checkpoints.

    Raises:
        StudentsFailedError: if some could not be trained; the others were, and are published.
        StoppedError: if this process was asked to stop.
    """
    missing = {request.name: request for request in unpublished(project, requests, plan)}
    if missing:
        places = {name: _place(project, request, plan) for name, request in missing.items()}
        jobs = {
            name: _job(project, request, plan, teacher, places[name][1], cluster)
            for name, request in missing.items()
        }
        at_once = cluster.students_at_once(len(jobs))
        before = teacher_forward_tokens(project.events())
        with project.timed("train", students=list(jobs), at_once=at_once) as cost:
            cost["trained_tokens"] = 0

            def publish(name: str) -> None:
                tokens = teacher_forward_tokens(project.events()) - before
                result = _publish(project, missing[name], *places[name], plan, tokens)
                cost["teacher_forward_tokens"] = tokens
                cost["trained_tokens"] += result["trained_tokens"]

            with _progress_bars(project, jobs) as steps:
                runs = StudentRuns(project, cluster, jobs, at_once=at_once)
                ended = runs.run(trained=publish, steps_done=lambda name: steps.get(name, 0))
            require_all_trained(ended, steps)
    students = published_students(project, requests, plan)
    return [replace(student, was_published=student.name not in missing) for student in students]


def require_all_trained(students: dict[str, StudentTraining], steps: dict[str, int]) -> None:
    """All students are trained.

    Raises:
        StudentsFailedError: naming those that failed, and why.
        StoppedError: saying how far each one is.
    """
    trained = [name for name, student in students.items() if student.state == "trained"]
    failed = {name: student.why for name, student in students.items() if student.state == "failed"}
    if failed:
        listed = "\n  ".join(f"{name}: {why}" for name, why in failed.items())
        raise StudentsFailedError(
            f"{len(failed)} of {len(students)} students could not be trained:\n  {listed}\n"
            f"{', '.join(trained) or 'none'} trained and published. The logs of the run folder say "
            "more. Run the command again after the cause is gone: it trains what is missing, from "
            "the last checkpoints; or leave a student out with --set students.NAME=null"
        )
    if len(trained) < len(students):
        far = (
            f"{name} {student.why or f'waits at step {steps.get(name, 0)}'}"
            for name, student in students.items()
            if student.state != "trained"
        )
        raise StoppedError(
            f"stopped: {len(trained)} of {len(students)} students are trained and published; "
            f"{'; '.join(far)}; run the command again to go on"
        )


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
    decides = {
        "train": request.train.deciding(),
        "untrained": request.untrained.fingerprint,
        "label_set": plan.spec.key,
        "selection": plan.selection_keys["train"],
    }
    if request.train.heldout_decides:
        decides["heldout"] = plan.selection_keys["heldout"]
    key = key_of(decides)
    return key, project.directory / "students" / f"{request.name}-{key[:12]}"


def _publish(
    project: Project,
    request: StudentRequest,
    key: str,
    directory: Path,
    plan: Plan,
    forward_tokens: int,
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
        "teacher_forward_tokens": forward_tokens,
        "final": metrics[-1],
    }
    if (directory / SELECTION_FILE).is_file():
        result["exported"] = json.loads((directory / SELECTION_FILE).read_text())
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
    heldout = None
    if train.heldout.every_steps is not None and plan.selections["heldout"].requests:
        heldout = own.model_copy(update={"selection": plan.selection_keys["heldout"]})
    labels, *mixture = resolve_labels(own, train.data)
    require_fit_labels(mixture)  # the project's own were looked at before anything was prepared
    job = TrainJob(
        labels=labels,
        mixture=tuple(mixture),
        heldout=heldout,
        model=untrained.directory,
        tokenizer=teacher.model.directory,
        train=train,
        output=str(directory),
        card=card,
        threads=cluster.student_threads,
    )
    write_atomically(directory / "job.json", job.model_dump_json(indent=1).encode())
    return job


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().split("\n") if line.endswith("}")]


def _last_step(path: Path) -> dict[str, Any] | None:
    """The newest step that a training noted; a line that is being written is left out."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - LAST_LINES_BYTES))
        lines = [line for line in stream.read().split(b"\n") if line.endswith(b"}")]
    return json.loads(lines[-1]) if lines else None


@contextmanager
def _progress_bars(project: Project, jobs: dict[str, TrainJob]) -> Iterator[dict[str, int]]:
    """Show every training from the lines that it writes, until the block ends.

    Yields:
        Steps that were seen, by student; it changes while the block goes on.
    """
    finished = threading.Event()
    steps: dict[str, int] = {}
    paces = {name: Pace() for name in jobs}
    with project.bars() as bars, project.console.status("starting the trainer") as status:

        def show() -> None:
            for name, job in jobs.items():
                last = _last_step(Path(job.output) / METRICS_FILE)
                if last is not None and last["step"] != steps.get(name):
                    status.stop()
                    steps[name] = last["step"]
                    paces[name].add(last)
                    pace = paces[name].text(last["total_steps"] - last["step"])
                    state = f"loss {last['loss']:.3f}, {pace}"
                    bars.show(f"training {name}", last["step"], last["total_steps"], state)
                    _export(project, name, last)

        def watch() -> None:
            while not finished.wait(POLL_S):
                show()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield steps
        finally:
            finished.set()
            watcher.join()
            show()


def _export(project: Project, name: str, last: dict[str, Any]) -> None:
    """The newest step of a student, for Prometheus."""
    for metric, value in {
        "training_step": last["step"],
        "training_total_steps": last["total_steps"],
        "training_loss": last["loss"],
        "training_tokens_per_second": last["tokens"] / max(1e-9, last["seconds"]),
        "training_data_wait_share": last["data_wait_share"],
    }.items():
        project.metrics.set(metric, value, student=name)
