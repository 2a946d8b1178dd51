"""Measure every student, and the models they started from, on the held-out labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster import Cluster, unwrapped
from pipeline.project import Project
from pipeline.steps.plan import Plan
from pipeline.steps.train import TrainedStudent
from storage.keys import key_of
from student_train.config import EvaluateJob, LabelSource

UNTRAINED = "untrained"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out quality of one model."""

    name: str
    """Name of the student, or ``untrained``."""
    result: dict[str, Any]
    """What ``student_train.evaluate`` wrote: metrics, num_tokens, generations."""


def evaluate_students(
    project: Project, students: Sequence[TrainedStudent], plan: Plan, cluster: Cluster
) -> list[Evaluation]:
    """Evaluations of the untrained models first, then of every student; published ones are read.

    Returns an empty list when the project has no held-out prompts.
    """
    if not plan.selections["heldout"].requests:
        return []
    wanted = _wanted(project, students, plan)
    missing = [(name, model, path) for name, model, path in wanted if not path.is_file()]
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
    return [
        Evaluation(name, project.read_json(str(path.relative_to(project.directory))))
        for name, _, path in wanted
    ]


def _wanted(
    project: Project, students: Sequence[TrainedStudent], plan: Plan
) -> list[tuple[str, str, Path]]:
    """(name, model directory, result file) of every model."""
    key = key_of(
        {
            "evaluate": project.config.evaluate.model_dump(mode="json", exclude={"micro_tokens"}),
            "label_set": plan.spec.key,
            "selection": plan.selection_keys["heldout"],
        }
    )
    untrained = {student.untrained.key: student.untrained.directory for student in students}
    models = [
        (
            UNTRAINED if len(untrained) == 1 else f"{UNTRAINED}-{model_key[:8]}",
            directory,
            project.directory / "untrained" / model_key[:12] / f"evaluation-{key[:12]}.json",
        )
        for model_key, directory in untrained.items()
    ]
    models += [
        (student.name, student.model, student.directory / f"evaluation-{key[:12]}.json")
        for student in students
    ]
    return models


def _run(project: Project, names: list[str], jobs: list[EvaluateJob], cluster: Cluster) -> None:
    """All jobs in one Ray actor: the imports cost more than the evaluation of a small model."""
    ray = cluster.ray
    options = cluster.options(
        threads=cluster.cpus, gpus=project.config.cluster.gpus_per_worker and 1
    )
    worker = ray.remote(EvaluationWorker).options(**options).remote()
    with project.console.status("") as status:
        for number, (name, job) in enumerate(zip(names, jobs, strict=True), start=1):
            status.update(f"evaluating {name} ({number} of {len(jobs)})")
            try:
                ray.get(worker.evaluate.remote(job))
            except ray.exceptions.RayTaskError as error:
                raise unwrapped(error) from None
    ray.kill(worker)


class EvaluationWorker:
    """Evaluates one model after the other in a process of its own (a Ray actor)."""

    def evaluate(self, job: EvaluateJob) -> None:
        """Measure one model and write its result."""
        from student_train.evaluate import evaluate_student

        evaluate_student(job)
