"""Which steps a run does, and what it says it would do."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.cluster import Cluster
from pipeline.preview import preview
from pipeline.project import Project
from pipeline.run import NotTrainedError, run_project, student_requests
from pipeline.steps.evaluate import unevaluated
from pipeline.steps.plan import Plan
from pipeline.steps.train import published_students, remove_students, unpublished
from pipeline.wanted import Step, Steps, choose_steps
from storage.errors import ConfigError, NotLabelledError
from tests.unit.pipeline.test_label_step import label, plan_of

OpenProject = Callable[..., Project]
STUDENTS = ("students={a: {epochs: 1}, b: {epochs: 2}}",)


@pytest.mark.parametrize(
    ("only", "first", "wanted"),
    [
        (None, None, list(Step)),
        (Step.TRAIN, None, [Step.TRAIN]),
        (None, Step.EVALUATE, [Step.EVALUATE, Step.REPORT]),
        (None, Step.PLAN, list(Step)),
    ],
)
def test_one_step_or_those_from_one_on(
    only: Step | None, first: Step | None, wanted: list[Step]
) -> None:
    assert choose_steps(only, first).wanted == set(wanted)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ((Step.TRAIN, Step.LABEL, []), "--only train and --from label contradict each other"),
        ((None, None, [Step.LABEL]), "labels are never replaced"),
        ((Step.REPORT, None, [Step.TRAIN]), "--force train needs that step"),
    ],
)
def test_choices_that_cannot_be_are_refused(
    choice: tuple[Step | None, Step | None, list[Step]], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        choose_steps(*choice)


def test_an_unknown_step_is_wrong_usage(project_file: Path) -> None:
    assert main(["run", str(project_file), "--only", "trian"]) == 2


# -- a project of which parts are published -------------------------------------------------------
@pytest.fixture
def open_trainable(open_project: OpenProject, teacher_directory: Path) -> OpenProject:
    """A project with two students, which start from the teacher."""

    def open_it(*overrides: str) -> Project:
        return open_project(f"train={{model: {teacher_directory}}}", *STUDENTS, *overrides)

    return open_it


def publish(project: Project, plan: Plan, names: Sequence[str], *, measured: Sequence[str]) -> None:
    """Students and evaluations as the steps leave them."""
    from pipeline.steps import train

    teacher, _ = plan_of(project)
    requests = [r for r in student_requests(project, teacher) if r.name in names]
    for request in requests:
        _, directory = train._place(project, request, plan)
        directory.mkdir(parents=True)
        (directory / train.RESULT_FILE).write_text(json.dumps({"name": request.name}))
    students = published_students(project, requests, plan)
    for name, _, path in unevaluated(project, students, plan):
        if name in measured:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"metrics": {}}))


def test_a_dry_run_tells_what_is_there_and_what_is_missing(open_trainable: OpenProject) -> None:
    project = open_trainable()
    _, plan = plan_of(project)
    label(project, plan, 0, 4)
    publish(project, plan, ["a"], measured=["untrained", "a"])
    found = {entry.step: (entry.done, entry.to_do) for entry in preview(project, Steps())}
    assert list(found) == list(Step)
    assert found[Step.LABEL] == (("4 samples",), ("label 2 samples",))
    assert found[Step.TRAIN] == (("a",), ("b",))
    assert found[Step.EVALUATE] == (("a",), ("b",))
    forced = choose_steps(first=Step.TRAIN, force=[Step.TRAIN])
    (train, evaluate, _) = preview(project, forced)
    assert (train.done, train.to_do) == ((), ("a", "b"))
    assert evaluate.to_do == ("a", "b")


def test_a_dry_run_publishes_nothing(
    project_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(project_file), "--dry-run", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in steps] == [step.value for step in Step]
    assert steps[1]["to_do"] == ["label 6 samples"]
    assert not list((tmp_path / "labels").glob("label_sets/*"))
    assert not (tmp_path / "runs" / "tiny" / "report.json").exists()
    assert main(["run", str(project_file), "--dry-run", "--only", "label"]) == 0
    assert "label 6 samples" in capsys.readouterr().out


def test_a_step_whose_inputs_are_missing_is_refused(open_trainable: OpenProject) -> None:
    project = open_trainable()
    _, plan = plan_of(project)
    with project.running(), pytest.raises(NotTrainedError, match="students a, b are not trained"):
        run_project(project, choose_steps(first=Step.EVALUATE))
    with project.running(), pytest.raises(NotLabelledError, match="4 of 4 training samples"):
        run_project(project, choose_steps(only=Step.TRAIN))
    label(project, plan, 0, 6)
    publish(project, plan, ["a"], measured=[])
    with project.running(), pytest.raises(NotTrainedError, match="students b are not trained"):
        run_project(project, choose_steps(only=Step.REPORT))


def test_the_plan_alone_calls_nobody(open_trainable: OpenProject) -> None:
    project = open_trainable()
    with project.running():
        result = run_project(project, choose_steps(only=Step.PLAN, force=[Step.PLAN]))
    assert (result.labelled_samples, result.students) == (0, [])
    assert project.store.keys() == []


def test_removed_students_are_missing_and_others_stay(open_trainable: OpenProject) -> None:
    project = open_trainable()
    teacher, plan = plan_of(project)
    publish(project, plan, ["a", "b"], measured=["a", "b"])
    requests = student_requests(project, teacher)
    assert unpublished(project, requests, plan) == []
    remove_students(project, requests[:1], plan)
    assert unpublished(project, requests, plan) == requests[:1]
    (kept,) = published_students(project, requests[1:], plan)
    assert kept.name == "b"
    assert unevaluated(project, [kept], plan)[0][0] == "untrained"
    assert not Cluster(project.config.cluster).started
