"""One YAML file describes a project. Loading, overriding and explaining what is wrong with it."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from pipeline.sweep import SweepConfig
from storage.config import Config
from storage.errors import ConfigError
from student_train.config import EvaluateConfig, TrainConfig, missing_columns
from teacher_server.config import DataConfig, LabelConfig, TeacherConfig

Tree = dict[str, Any]
Model = TypeVar("Model", bound=Config)

UNION_TAG = re.compile(r"str|(constrained-)?int|function-.*|[A-Z]\w*Config")
"""What pydantic adds to a path where a value may be text, a number or a section."""


class WorkerRangeConfig(Config):
    """As many processes as the cluster has room for: a training grows and shrinks with it."""

    min: int = Field(default=1, ge=1)
    """With fewer, it waits."""
    max: int = Field(ge=1)
    """It never takes more."""

    @model_validator(mode="after")
    def _ordered(self) -> "WorkerRangeConfig":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class ClusterConfig(Config):
    """Where the work runs. Nothing here changes a result beyond rounding."""

    address: str = "local"
    """``local`` starts Ray on this machine, ``auto`` joins the cluster this machine belongs to,
    anything else is the address of a cluster. ``RAY_ADDRESS`` wins where it is set."""
    cpus: int | None = Field(default=None, ge=1)
    """CPUs that a local Ray may use; all by default."""
    student_workers: Annotated[int, Field(ge=1)] | WorkerRangeConfig = 1
    """Processes (ranks) that train one student. ``{min: 1, max: 4}`` lets it grow and shrink with a
    cluster whose machines come and go; every change costs a restart from the last checkpoint."""
    students_at_once: int | None = Field(default=None, ge=1)
    """Students that are trained at the same time; by default as many as the cluster has CPUs and
    GPUs for, one where ``student_workers`` is a range."""
    student_restarts: int = Field(default=2, ge=0)
    """How often a training whose processes died begins again from its last checkpoint; one that got
    further meanwhile starts counting anew. The other students are trained in any case."""
    student_threads: int | None = Field(default=None, ge=1)
    """CPU threads of each of them; by default the CPUs are shared out evenly."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs of each training process; engines take ``teacher.backend.tensor_parallel``."""
    teacher_gpus: bool = False
    """Whether engines run on GPUs."""
    engine_hour_cost: float | None = Field(default=None, ge=0)
    """What one teacher engine costs per hour, in any currency: shown and noted while labelling."""

    @model_validator(mode="after")
    def _one_elastic_student(self) -> "ClusterConfig":
        if self.is_elastic and (self.students_at_once or 1) > 1:
            raise ValueError(
                "student_workers is a range, and several students_at_once would each reckon with "
                "the whole cluster; give a number of student_workers, or one student at once"
            )
        return self

    @property
    def worker_bounds(self) -> tuple[int, int]:
        """Fewest and most processes of one student."""
        workers = self.student_workers
        return (workers, workers) if isinstance(workers, int) else (workers.min, workers.max)

    @property
    def is_elastic(self) -> bool:
        """Whether trainings grow and shrink."""
        low, high = self.worker_bounds
        return low < high


class RunConfig(Config):
    """A distillation project. Sections that a command does not need may be absent."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the project: its folder below ``runs``."""
    store: str
    """URI of the label store, shared by all projects: a path, ``s3://``, ``gs://``, ``az://``."""
    runs: str = "./runs"
    """Directory of run folders: models, checkpoints, reports, events."""
    data: DataConfig
    """Prompts."""
    teacher: TeacherConfig
    """The model that labels."""
    label: LabelConfig = LabelConfig()
    """What is recorded for every token."""
    train: TrainConfig | None = None
    """What all students share."""
    students: dict[str, Tree] = Field(default_factory=dict)
    """NAME: overrides of ``train``, such as ``{loss.weight.soft_weight: 0.0}``. Without any, one
    student called ``student`` is trained as ``train`` says. ``--set students.NAME=null`` leaves
    one out."""
    sweep: SweepConfig | None = None
    """More students, from lists of values."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured on the held-out prompts."""
    cluster: ClusterConfig = ClusterConfig()
    """Where the work runs."""

    @field_validator("students", mode="before")
    @classmethod
    def _null_leaves_out(cls, students: object) -> object:
        if not isinstance(students, dict):
            return students
        return {name: change for name, change in students.items() if change is not None}

    @field_validator("students")
    @classmethod
    def _plain_names(cls, students: dict[str, Tree]) -> dict[str, Tree]:
        for name in students:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == "untrained":
                raise ValueError(f"{name!r} cannot be the name of a student")
        return students

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        for name, train in self.student_configs().items():
            if train.loss.hard == "dataset" and self.label.mode != "score":
                raise ValueError(
                    f"student {name!r}: loss.hard 'dataset' needs label.mode 'score'; labels made "
                    "by generating hold no dataset tokens"
                )
            if train.loss.hard == "sampled" and self.label.mode == "score":
                raise ValueError(
                    f"student {name!r}: loss.hard 'sampled' needs label.mode 'generate'; use "
                    "'dataset' or 'argmax' with scored labels"
                )
            lacking = missing_columns(train.loss, self.label.columns)
            if lacking:
                raise ValueError(
                    f"student {name!r}: its loss needs the label columns {', '.join(lacking)}; add "
                    "them to label.columns"
                )
        return self

    def student_configs(self) -> dict[str, TrainConfig]:
        """Every student's complete training configuration."""
        swept = {} if self.sweep is None else self.sweep.students()
        if self.train is None:
            if self.students or swept:
                raise ValueError("students are given but the section train is missing")
            return {}
        both = self.students.keys() & swept.keys()
        if both:
            raise ValueError(f"student {min(both)!r} is in students and in the sweep; rename it")
        shared = self.train.model_dump(mode="json")
        overrides = {**self.students, **swept} or {"student": {}}
        return {
            name: validate(TrainConfig, merge(shared, change), f"students.{name}")
            for name, change in overrides.items()
        }


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a project from YAML and apply ``--set`` overrides from left to right.

    Raises:
        ConfigError: naming the key, what was wanted and found, and the nearest valid name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config {str(path)!r}: {error}") from error
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a mapping, found {type(loaded).__name__}")
    tree = _expand_project(loaded)
    for override in overrides:
        tree = merge(tree, _parse_override(override))
    return validate(RunConfig, tree, str(path))


def _parse_override(override: str) -> Tree:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from error
    return expand_dotted_keys({name.strip(): value})


def _expand_project(loaded: Tree) -> Tree:
    """The whole file expanded, except for the names of students: ``qwen-0.5b`` is one name."""
    tree = expand_dotted_keys({n: value for n, value in loaded.items() if n != "students"})
    if "students" not in loaded:
        return tree
    students = loaded["students"]
    if isinstance(students, Mapping):
        students = {
            str(name): expand_dotted_keys(change) if isinstance(change, Mapping) else change
            for name, change in students.items()
        }
    return merge(tree, {"students": students})


def expand_dotted_keys(tree: Mapping[str, Any]) -> Tree:
    """``{"a.b": 1, "a": {"c": 2}}`` as ``{"a": {"b": 1, "c": 2}}``."""
    expanded: Tree = {}
    for name, value in tree.items():
        inner = expand_dotted_keys(value) if isinstance(value, Mapping) else value
        for part in reversed(str(name).split(".")):
            inner = {part: inner}
        expanded = merge(expanded, inner)
    return expanded


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> Tree:
    """``base`` with ``change`` on top.

    A section whose ``type`` changes starts anew: the options of the old type mean nothing to the
    new one.
    """
    merged = dict(base)
    for name, value in change.items():
        old = merged.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            retyped = "type" in value and value["type"] != old.get("type", value["type"])
            merged[name] = dict(value) if retyped else merge(old, value)
        else:
            merged[name] = value
    return merged


def validate(model: type[Model], tree: Mapping[str, Any], name: str) -> Model:
    """Check a tree strictly.

    Raises:
        ConfigError: one line per problem, with the path of the key.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors() if not _is_noise(problem)]
        raise ConfigError(f"{name}: " + "\n  ".join(dict.fromkeys(lines))) from error


def _explain(model: type[BaseModel], problem: Any) -> str:
    path = _settings_path(model, problem["loc"])
    where = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        if path[-1] in known:
            return f"unknown key {where!r}: another type has such an option, this one has not"
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
        return f"unknown key {where!r}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if problem["type"] == "missing":
        return f"missing key {where!r}"
    return f"{where}: {message}, found {problem.get('input')!r:.80}"


def _is_noise(problem: Any) -> bool:
    """A section where text is allowed too: what is wrong inside the section is what matters."""
    plain = problem["loc"][-1:] in (("str",), ("int",), ("constrained-int",))
    return plain and isinstance(problem["input"], Mapping)


def _settings_path(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The path as it is written in YAML: pydantic also names the tag of a union's member."""
    path: list[str] = []
    tagged: list[str] | None = None
    for index, part in enumerate(location):
        if UNION_TAG.fullmatch(str(part)):
            continue
        if tagged != path and part in _tags_at(model, path):
            tagged = list(path)  # a field may have the name of a tag, but the tag comes first
            continue
        last = index == len(location) - 1
        if last or isinstance(part, int) or not path or str(part) in _fields_at(model, path):
            path.append(str(part))
    return path


def _tags_at(model: type[BaseModel], path: Sequence[str]) -> set[str]:
    """Tags of the union of sections at a path, empty where there is none."""
    models = _models_at(model, path)
    types = [found.model_fields["type"] for found in models if "type" in found.model_fields]
    return {field.default for field in types} if len(models) > 1 else set()


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """Names of the fields that a configuration has at a path, following unions."""
    return sorted({name for found in _models_at(model, path) for name in found.model_fields})


def _models_at(model: type[BaseModel], path: Sequence[str]) -> list[type[BaseModel]]:
    models: list[type[BaseModel]] = [model]
    for part in path:
        inner: list[type[BaseModel]] = []
        for candidate in models:
            field = candidate.model_fields.get(part)
            if field is not None:
                inner += _models_in(field.annotation)
        # a part that names no field is an index: stay
        models = inner or models
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
