"""The graph of a project: prepare, plan, label, train, evaluate, report."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from pipeline.cluster import Cluster
from pipeline.project import Project
from pipeline.steps.certify import certify_labels
from pipeline.steps.evaluate import (
    Evaluation,
    evaluate_students,
    published_evaluations,
    remove_evaluations,
)
from pipeline.steps.label import (
    Labelled,
    label_missing,
    requested_label_set,
    without_quarantined,
)
from pipeline.steps.plan import Plan, forget_plans, make_plan
from pipeline.steps.prepare import PreparedTeacher, prepare_student, prepare_teacher
from pipeline.steps.train import (
    StudentRequest,
    TrainedStudent,
    remove_students,
    train_students,
    unpublished,
)
from pipeline.wanted import Step, Steps
from storage.certificate import require_fit_samples
from storage.errors import ConfigError, DistillError, NotLabelledError


class NotTrainedError(DistillError):
    """A student is needed that is not published."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left behind."""

    plan: Plan
    labelled_samples: int
    students: list[TrainedStudent]
    evaluations: list[Evaluation]


def plan_project(project: Project) -> tuple[PreparedTeacher, Plan]:
    """Teacher and plan; no teacher call."""
    with project.at("plan"):
        teacher = prepare_teacher(project)
        return teacher, make_plan(project, teacher)


def labelled_plan(project: Project) -> tuple[PreparedTeacher, Plan]:
    """Teacher and plan of what students can learn from: samples in quarantine are left out."""
    teacher, plan = plan_project(project)
    return teacher, without_quarantined(project, plan)


def label_project(
    project: Project, cluster: Cluster, *, retry_quarantined: bool = False
) -> tuple[PreparedTeacher, Plan, Labelled]:
    """Label what is missing.

    Args:
        project: The project.
        cluster: Where the teacher runs.
        retry_quarantined: Also ask for samples that were set aside earlier.

    Returns:
        Teacher, the plan as it was made, and what was done.
    """
    teacher, plan = plan_project(project)
    for row in plan.skipped_rows:
        project.say(f"skipped {row}")
    if plan.skipped_rows:
        project.say(f"{len(plan.skipped_rows)} unusable rows skipped (data.on_bad_row: skip)")
    with project.at("label"):
        done = label_missing(project, plan, teacher, cluster, retry_quarantined=retry_quarantined)
    aside = len(done.quarantined)
    cached = len(plan.requests()) - done.num_labelled - aside
    project.metrics.add("samples_cached_total", cached)
    if done.num_labelled == 0 and not aside:
        project.say(f"labels: all {cached} samples are cached, the teacher was called 0 times")
    else:
        project.say(f"labels: {done.num_labelled} samples labelled, {cached} cached")
    if project.config.label.qa.enabled:
        certify_labels(project, plan, teacher, cluster, project.config.label.qa)
    if aside:
        project.say(
            f"{aside} samples are in quarantine and left out: `distill show {plan.spec.key[:12]}` "
            "tells why"
        )
    return teacher, plan, done


def student_requests(project: Project, teacher: PreparedTeacher) -> list[StudentRequest]:
    """Every student of the project, with the model that it starts from."""
    return [
        StudentRequest(name, train, prepare_student(project, train.model, teacher))
        for name, train in project.config.student_configs().items()
    ]


def train_project(
    project: Project, teacher: PreparedTeacher, plan: Plan, cluster: Cluster
) -> list[TrainedStudent]:
    """Train every student that is not published yet.

    Raises:
        ConfigError: if the project describes no student.
        NotLabelledError: if labels are missing.
        UnfitLabelsError: if the newest certificate of their set refuses them.
    """
    with project.at("train"):
        students = _train_project(project, teacher, plan, cluster)
    for student in students:
        state = "already published, skipped" if student.was_published else "trained"
        project.say(
            f"student {student.name}: {state} (teacher forward tokens: "
            f"{student.result['teacher_forward_tokens']})"
        )
    return students


def _train_project(
    project: Project, teacher: PreparedTeacher, plan: Plan, cluster: Cluster
) -> list[TrainedStudent]:
    if project.config.train is None:
        raise ConfigError("the config has no section train; add one to train students")
    wanted = plan.selections["train"].sample_keys
    view = project.store.view(plan.spec)
    num_missing = int((~view.contains(wanted)).sum())
    if num_missing:
        raise NotLabelledError(
            f"{num_missing} of {len(wanted)} training samples have no labels yet; "
            "run `distill label` first"
        )
    requested_label_set(project, plan, teacher)
    require_fit_samples(view, [request.key for request in plan.requests()])
    requests = student_requests(project, teacher)
    return train_students(project, requests, plan=plan, teacher=teacher, cluster=cluster)


def run_project(project: Project, steps: Steps = Steps()) -> RunResult:  # noqa: B008 - frozen
    """The steps that are wanted, each skipping what is published.

    Raises:
        NotLabelledError, NotTrainedError: if a step is wanted whose inputs are not there.
    """
    from pipeline.preflight import require_fit_before_labels
    from pipeline.steps.report import remove_report, write_report

    labelled = 0
    students: list[TrainedStudent] = []
    evaluations: list[Evaluation] = []
    if Step.PLAN in steps.forced:
        forget_plans(project)
    with Cluster(project.config.cluster) as cluster:
        if Step.LABEL in steps.wanted:
            if project.config.train is not None and steps.need_students:
                with project.at("preflight"):
                    require_fit_before_labels(project)
            teacher, plan, done = label_project(project, cluster)
            labelled = done.num_labelled
        else:
            teacher, plan = plan_project(project)
        plan = without_quarantined(project, plan)
        if project.config.train is not None and steps.need_students:
            if Step.TRAIN not in steps.wanted:
                require_published(project, student_requests(project, teacher), plan)
            if Step.TRAIN in steps.forced:
                remove_students(project, student_requests(project, teacher), plan)
            students = train_project(project, teacher, plan, cluster)
            if Step.EVALUATE in steps.forced:
                remove_evaluations(project, students, plan)
            if Step.EVALUATE in steps.wanted:
                evaluations = evaluate_students(project, students, plan, cluster)
            else:
                evaluations = published_evaluations(project, students, plan)
        if Step.REPORT in steps.forced:
            remove_report(project)
        if Step.REPORT in steps.wanted:
            with project.at("report"):
                write_report(project, plan, teacher, students, evaluations)
    return RunResult(plan, labelled, students, evaluations)


def require_published(project: Project, requests: Sequence[StudentRequest], plan: Plan) -> None:
    """The steps behind training need its students.

    Raises:
        NotTrainedError: naming those that are missing.
    """
    missing = [request.name for request in unpublished(project, requests, plan)]
    if missing:
        raise NotTrainedError(
            f"students {', '.join(missing)} are not trained yet; run `distill train` or leave out "
            "--only and --from"
        )


def quality_table(evaluations: Sequence[Evaluation]) -> Table:
    """Held-out quality, one row per model."""
    titles = {
        "kl": "KL to teacher (nats)",
        "cross_entropy": "cross-entropy (nats)",
        "agreement": "top-1 agreement",
    }
    table = Table(title="held-out quality")
    table.add_column("model")
    metrics = list(evaluations[0].result["metrics"])
    for metric in metrics:
        table.add_column(titles[metric], justify="right")
    for evaluation in evaluations:
        values = (evaluation.result["metrics"][metric] for metric in metrics)
        table.add_row(evaluation.name, *(f"{value:.4f}" for value in values))
    return table
