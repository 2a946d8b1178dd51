"""What a run folder holds, at any time: during a run, after it, after it failed."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from pipeline.config import RunConfig, validate
from pipeline.project import Project
from pipeline.report.found import Found, StudentFolder
from pipeline.steps.evaluate import UNTRAINED, Evaluation, evaluation_file
from pipeline.steps.label import without_quarantined
from pipeline.steps.plan import PLAN_FILE, PLANS_DIRECTORY, SPLITS, Plan
from pipeline.steps.train import RESULT_FILE
from storage.errors import ConfigError, DistillError, LabelStoreError
from storage.objects import REMOTE_SCHEMES
from storage.selection import load_selection
from storage.store import LabelStore
from student_train.config import METRICS_FILE, TrainConfig

CONFIG_FILE = "config.json"


def open_run_folder(directory: Path, console: Console) -> Project:
    """The project of a run folder, wherever it was copied to.

    A relative path of the store starts where the run was started, if the folder still lies where
    its settings say; otherwise in the current directory.

    Raises:
        ConfigError: if it is no run folder, or its settings cannot be read.
    """
    file = directory / CONFIG_FILE
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{str(directory)!r} is no run folder (its {CONFIG_FILE} cannot be read: {error}); "
            "name one, such as runs/NAME, or the YAML file of a project"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold a mapping, found {type(tree).__name__}")
    config = validate(RunConfig, tree, str(file))
    project = Project(config, console)
    project.directory = directory.absolute()
    inner = Path(config.runs) / config.name
    if not inner.is_absolute() and not config.store.startswith(REMOTE_SCHEMES):
        parts = inner.parts
        if project.directory.parts[-len(parts) :] == parts:
            start = project.directory.parents[len(parts) - 1]
            project.store_uri = str(start / config.store)
    return project


def find_everything(project: Project, *, live: bool, go_on: Sequence[str] | None = None) -> Found:
    """What is known of a run, from its folder and the store; runs nothing.

    Args:
        project: The project.
        live: Whether a process is working in the run folder.
        go_on: Command line that does what is missing; by default a run of the folder's settings.
    """
    missing: dict[str, str] = {}
    asked = _asked(project)
    plan = None
    if asked is None:
        missing["labels"] = "the run ended before it knew which labels it needs"
    else:
        try:
            plan = _plan(project, asked)
        except (DistillError, OSError) as error:
            missing["labels"] = f"the labels cannot be read: {error}"
    students = [] if asked is None else _students(project, asked["label_set"])
    evaluations = [] if asked is None else _evaluations(project, asked, plan, students)
    directory = None if asked is None else asked.get("teacher_directory")
    tokenizer = None if directory is None else Path(directory)
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        missing["response"] = f"the tokenizer of the teacher, {directory}, is not on this machine"
        tokenizer = None
    words = go_on or ("distill", "run", str(project.directory / CONFIG_FILE))
    return Found(
        plan=plan,
        tokenizer=tokenizer,
        students=students,
        evaluations=evaluations,
        go_on=shlex.join(words),
        live=live,
        missing=missing,
    )


def _asked(project: Project) -> dict[str, Any] | None:
    """The newest plan; put together for runs of before it was noted, None if there is none."""
    asked: dict[str, Any] | None = project.read_json(PLAN_FILE)
    if asked is not None:
        return asked
    plans = list((project.directory / PLANS_DIRECTORY).glob("*.json"))
    named = [event["label_set"] for event in project.events() if event.get("label_set")]
    named += [json.loads(f.read_text())["label_set"] for f in _result_files(project)]
    if not plans or not named:
        return None
    newest = max(plans, key=lambda file: file.stat().st_mtime)
    models = sorted(project.directory.glob("models/gguf-*"))
    teacher = project.config.teacher.model
    local = str(teacher) if isinstance(teacher, str) else (str(models[-1]) if models else None)
    return {
        "label_set": named[-1],
        "teacher_directory": local,
        **json.loads(newest.read_text()),
    }


def _plan(project: Project, asked: dict[str, Any]) -> Plan:
    """The plan without the samples that were set aside.

    Raises:
        LabelStoreError: if the store, the label set or a selection is not there.
    """
    store = LabelStore(project.store_uri)
    if not store.objects.exists:
        raise LabelStoreError(f"store {project.store_uri!r} does not exist")
    spec = store.open(asked["label_set"]).spec
    selections = {s: load_selection(store.objects, asked["selections"][s]) for s in SPLITS}
    plan = Plan(
        spec,
        selections,
        asked["selections"],
        tuple(asked["skipped_rows"]),
        int(asked.get("context", 0)),
    )
    return without_quarantined(project, plan)


def _result_files(project: Project) -> list[Path]:
    return sorted(
        project.directory.glob(f"students/*/{RESULT_FILE}"), key=lambda f: f.stat().st_mtime
    )


def _students(project: Project, label_set: str) -> list[StudentFolder]:
    """The students that the settings ask for, each with its newest folder, if there is one."""
    published: dict[str, StudentFolder] = {}
    wanted = project.config.student_configs()
    for file in _result_files(project):
        result = json.loads(file.read_text())
        name = result["name"]
        if name in wanted and _fits(result, wanted[name], label_set):
            published[name] = StudentFolder(name, file.parent, result)
    return [published.get(name) or _unpublished(project, name) for name in wanted]


def _fits(result: dict[str, Any], wanted: TrainConfig, label_set: str) -> bool:
    """Whether a student was trained with these settings from these labels."""
    try:
        train = TrainConfig.model_validate(result["train"])
    except ValidationError:  # of another version
        return False
    return train.deciding() == wanted.deciding() and result["label_set"] == label_set


def _unpublished(project: Project, name: str) -> StudentFolder:
    """A student whose training did not end; its folder may not exist."""
    begun = [
        file.parent
        for file in project.directory.glob(f"students/*/{METRICS_FILE}")
        if file.parent.name.rpartition("-")[0] == name and not (file.parent / RESULT_FILE).is_file()
    ]
    newest = max(begun, key=lambda d: d.stat().st_mtime, default=project.directory / "students")
    return StudentFolder(name, newest, None)


def _evaluations(
    project: Project,
    asked: dict[str, Any],
    plan: Plan | None,
    students: Sequence[StudentFolder],
) -> list[Evaluation]:
    """Evaluations that are there, those of the untrained models first."""
    keys = asked["selections"] if plan is None else plan.selection_keys
    name = evaluation_file(project.config.evaluate, asked["label_set"], keys["heldout"])
    untrained = sorted(project.directory.glob(f"untrained/*/{name}"))
    files = [
        (UNTRAINED if len(untrained) == 1 else f"{UNTRAINED}-{file.parent.name[:8]}", file)
        for file in untrained
    ]
    files += [(s.name, s.directory / name) for s in students if s.result is not None]
    return [Evaluation(n, json.loads(file.read_text())) for n, file in files if file.is_file()]
