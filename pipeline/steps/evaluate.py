"""Measure every student, and the models they started from, on the held-out labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster import Cluster, unwrapped
from pipeline.logs import RunLog
from pipeline.project import Project
from pipeline.steps.plan import Plan
from pipeline.steps.train import TrainedStudent
from storage.errors import DistillError
from storage.keys import key_of
from student_train.config import EvaluateConfig, EvaluateJob, LabelSource

UNTRAINED = "untrained"


class EvaluationDiedError(DistillError):
    """The process that measured a model was killed, or crashed."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out quality of one model."""

    name: str
    """Name of the student, or ``untrained``."""
    result: dict[str, Any]
    """What ``student_train.evaluate`` wrote: metrics, num_tokens, generations, samples."""


def evaluate_students(
    project: Project, students: Sequence[TrainedStudent], plan: Plan, cluster: Cluster
) -> list[Evaluation]:
    """Evaluations of the untrained models first, then of every student; published ones are read.

    Returns an empty list when the project has no held-out prompts.
    """
    missing = unevaluated(project, students, plan)
    if missing:
        labels = LabelSource(
            store=project.store_uri,
            label_set=plan.spec.key,
            selection=plan.selection_keys["heldout"],
        )
        jobs = [
            EvaluateJob(
                labels=labels,
                model=model,
                evaluate=project.config.evaluate,
                output=str(path),
                threads=cluster.cpus,
            )
            for _, model, path in missing
        ]
        names = [name for name, _, _ in missing]
        with project.timed("evaluate", models=names):
            _run(project, names, jobs, cluster)
    return published_evaluations(project, students, plan)


def published_evaluations(
    project: Project, students: Sequence[TrainedStudent], plan: Plan
) -> list[Evaluation]:
    """Evaluations that are there, those of the untrained models first."""
    return [
        Evaluation(name, project.read_json(str(path.relative_to(project.directory))))
        for name, _, path in _wanted(project, students, plan)
        if path.is_file()
    ]


def evaluation_file(settings: EvaluateConfig, label_set: str, selection: str) -> str:
    """Name of the file with a model's quality on a selection; the same settings, the same name."""
    key = key_of(
        {
            "evaluate": settings.model_dump(mode="json", exclude={"micro_tokens"}),
            "label_set": label_set,
            "selection": selection,
        }
    )
    return f"evaluation-{key[:12]}.json"


def unevaluated(
    project: Project, students: Sequence[TrainedStudent], plan: Plan
) -> list[tuple[str, str, Path]]:
    """Name, model directory and result file of every model that is not measured yet."""
    return [wanted for wanted in _wanted(project, students, plan) if not wanted[2].is_file()]


def remove_evaluations(project: Project, students: Sequence[TrainedStudent], plan: Plan) -> None:
    """Let all models be measured again."""
    for _, _, path in _wanted(project, students, plan):
        path.unlink(missing_ok=True)


def _wanted(
    project: Project, students: Sequence[TrainedStudent], plan: Plan
) -> list[tuple[str, str, Path]]:
    """Name, model directory and result file of every model; none without held-out prompts."""
    if not plan.selections["heldout"].requests:
        return []
    file = evaluation_file(project.config.evaluate, plan.spec.key, plan.selection_keys["heldout"])
    untrained = {student.untrained.key: student.untrained.directory for student in students}
    models = [
        (
            UNTRAINED if len(untrained) == 1 else f"{UNTRAINED}-{model_key[:8]}",
            directory,
            project.directory / "untrained" / model_key[:12] / file,
        )
        for model_key, directory in untrained.items()
    ]
    models += [(student.name, student.model, student.directory / file) for student in students]
    return models


def _run(project: Project, names: list[str], jobs: list[EvaluateJob], cluster: Cluster) -> None:
    """All jobs in one Ray actor: the imports cost more than the evaluation of a small model."""
    ray = cluster.ray
    options = cluster.options(
        threads=cluster.cpus, gpus=project.config.cluster.gpus_per_worker and 1
    )
    worker = ray.remote(EvaluationWorker).options(**options).remote(project.log_for("evaluate"))
    with project.console.status("") as status:
        for number, (name, job) in enumerate(zip(names, jobs, strict=True), start=1):
            status.update(f"evaluating {name} ({number} of {len(jobs)})")
            try:
                ray.get(worker.evaluate.remote(job))
            except ray.exceptions.RayTaskError as error:
                raise unwrapped(error) from None
            except ray.exceptions.RayActorError as error:
                raise EvaluationDiedError(
                    f"the process that measured {name} died: {error}; if it had too little memory, "
                    "lower evaluate.micro_tokens; run the command again, what is measured is kept"
                ) from error
    ray.kill(worker)


class EvaluationWorker:
    """Evaluates one model after the other in a process of its own (a Ray actor)."""

    def __init__(self, log: RunLog) -> None:
        log.start("evaluation")

    def evaluate(self, job: EvaluateJob) -> None:
        """Measure one model and write its result."""
        from student_train.evaluate import evaluate_student

        evaluate_student(job)
