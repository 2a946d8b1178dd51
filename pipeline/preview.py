"""What a run would do."""

from dataclasses import dataclass

from pipeline.project import Project
from pipeline.run import labelled_plan, student_requests
from pipeline.steps.evaluate import unevaluated
from pipeline.steps.plan import forecast
from pipeline.steps.train import published_students, unpublished
from pipeline.wanted import Step, Steps


@dataclass(frozen=True, slots=True)
class StepPreview:
    """One step of a run."""

    step: Step
    done: tuple[str, ...]
    """What is published already."""
    to_do: tuple[str, ...]
    """What the step would do."""


def preview(project: Project, steps: Steps) -> list[StepPreview]:
    """What a run would do, one entry per wanted step; prepares models and plan, nothing else."""
    teacher, plan = labelled_plan(project)
    counts = forecast(project, plan)
    upgrades, misses = counts["upgrades"], counts["misses"]
    to_label = [f"score {upgrades} samples again"] * bool(upgrades)
    to_label += [f"label {misses} samples"] * bool(misses)
    requests = student_requests(project, teacher) if project.config.train is not None else []
    missing = requests if Step.TRAIN in steps.forced else unpublished(project, requests, plan)
    ready = published_students(project, [r for r in requests if r not in missing], plan)
    students = [student.name for student in ready]
    to_train = [request.name for request in missing]
    to_measure = [name for name, _, _ in unevaluated(project, ready, plan)]
    if Step.EVALUATE in steps.forced:
        to_measure = students
    heldout = bool(plan.selections["heldout"].requests)
    found = {
        Step.PLAN: (f"label set {plan.spec.key}",) * 2,
        Step.LABEL: ([f"{counts['hits']} samples"], to_label),
        Step.TRAIN: (students, to_train),
        Step.EVALUATE: (
            [name for name in students if heldout and name not in to_measure],
            [*to_measure, *to_train] if heldout else [],
        ),
        Step.REPORT: ([], ["write report.html and report.json"] if students or to_train else []),
    }
    return [
        StepPreview(step, tuple(done), tuple(to_do))
        for step, (done, to_do) in found.items()
        if step in steps.wanted
    ]
