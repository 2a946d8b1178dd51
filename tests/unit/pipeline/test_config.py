"""One YAML file: what is wrong with it is said with the path of the key and a way out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from pipeline.config import RunConfig, expand_dotted_keys, load_config, merge
from storage.errors import ConfigError
from student_train.config import PrunedModelConfig
from teacher_server.config import TransformersBackendConfig, VllmBackendConfig

YAML = """
name: p
store: labels
data: {train: [{path: a.jsonl}]}
teacher: {model: m, backend: {type: vllm, max_num_seqs: 3}}
train: {model: {type: pruned, keep_layers: [0, 2]}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def problem(file: Path, *overrides: str) -> str:
    """What is said about these settings, without the name of the file."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value).removeprefix(f"{file}: ")


def reachable(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and all models in its fields, unions included."""

    def inside(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from reachable(annotation)
        for argument in get_args(annotation):
            yield from inside(argument)

    yield model
    for field in model.model_fields.values():
        yield from inside(field.annotation)


SECTIONS = sorted(set(reachable(RunConfig)), key=lambda model: model.__name__)


# -- what is wrong --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stor=x", "unknown key 'stor'; did you mean 'store'?"),
        ("data.trian=[]", "unknown key 'data.trian'; did you mean 'train'?"),
        ("teacher.modle=x", "unknown key 'teacher.modle'; did you mean 'model'?"),
        (
            "teacher.backend.max_seqs=3",
            "unknown key 'teacher.backend.max_seqs'; did you mean 'max_num_seqs'?",
        ),
        (
            "teacher.model={type: gguf, pat: x, package: y}",
            "unknown key 'teacher.model.pat'; did you mean 'path'?",
        ),
        (
            "label.sampling.temprature=1",
            "unknown key 'label.sampling.temprature'; did you mean 'temperature'?",
        ),
        ("label.kind.top=1", "unknown key 'label.kind.top'; known here: cap, k, mass, type"),
        ("train.epoch=1", "unknown key 'train.epoch'; did you mean 'epochs'?"),
        (
            "train.loss.weight.weight=1",
            "unknown key 'train.loss.weight.weight'; did you mean 'soft_weight'?",
        ),
        (
            "train.model.keep_layer=[1]",
            "unknown key 'train.model.keep_layer'; did you mean 'keep_layers'?",
        ),
        ("evaluate.metric=[kl]", "unknown key 'evaluate.metric'; did you mean 'metrics'?"),
        ("cluster.cpu=1", "unknown key 'cluster.cpu'; did you mean 'cpus'?"),
        ("students={a: {epoch: 1}}", "students.a: unknown key 'epoch'; did you mean 'epochs'?"),
        (
            "students.a.loss.wieght.soft_weight=1",
            "students.a: unknown key 'loss.wieght'; did you mean 'weight'?",
        ),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_name(
    file: Path, override: str, expected: str
) -> None:
    found = problem(file, override)
    assert expected.removeprefix("students.a: ") in found
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=many", "train.epochs: Input should be a valid integer"),
        ("train.epochs=0", "train.epochs: Input should be greater than or equal to 1, found 0"),
        ("train.optimizer.lr=fast", "train.optimizer.lr: Input should be a valid number"),
        ("teacher.backend.replicas=x", "teacher.backend.replicas: Input should be a valid integer"),
        ("teacher.backend={type: vlm}", "teacher.backend: Input tag 'vlm'"),
        ("teacher.model={type: gguf}", "teacher.model: give exactly one of path and package"),
        ("train.model=3", "train.model: Input should be a valid string, found 3"),
        ("train.loss.soft=kl", "train.loss.soft: Input tag 'kl' found using 'type' does not match"),
        (
            "train.loss.weight=confidence_of",
            "train.loss.weight: Input tag 'confidence_of' found using 'type' does not match",
        ),
        (
            "train.loss.weight={type: entropy, measure: power_sum}",
            "student 'student': its loss needs the label columns power_sum_10",
        ),
        (
            "label.columns=[entrop]",
            "label.columns.0: Input should be 'entropy', 'power_sum_10', 'power_sum_200', "
            "'power_sum_400' or 'power_sums', found",
        ),
        ("label.kind={type: mass, mass: 3}", "label.kind.mass: Input should be less than 1"),
        ("label.kind={type: mass, k: 3}", "unknown key 'label.kind.k': another type has"),
        ("label.columns=[{type: counts, draws: 0}]", "label.columns.0.draws: Input should be"),
        ("label.tail=topk", "label: tail 'topk' knows the top-k only"),
        ("data.train=[]", "data.train: Tuple should have at least 1 item"),
        ("data.train=[{path: a}, {}]", "missing key 'data.train.1.path'"),
        ("name=a/b", "name: String should match pattern"),
        ("students.untrained={}", "students: 'untrained' cannot be the name of a student"),
        ("students={a: 3}", "students.a: Input should be a valid dictionary, found 3"),
        ("students.a.loss.weight.soft_weight=2", "students.a: loss.weight.soft_weight: Input"),
        ("train=null", "OK"),
    ],
)
def test_a_wrong_value_is_named_with_its_path_and_what_was_found(
    file: Path, override: str, expected: str
) -> None:
    if expected == "OK":
        assert load_config(file, [override]).train is None
        return
    assert problem(file, override).startswith(expected)


def test_all_problems_are_listed_at_once(file: Path) -> None:
    found = problem(file, "stor=x", "train.epochs=0").splitlines()
    assert len(found) == 2


def test_missing_sections_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: p\n")
    found = problem(path)
    for key in ("store", "data", "teacher"):
        assert f"missing key '{key}'" in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2]", "must hold a mapping, found list"),
        ("", "must hold a mapping, found NoneType"),
        ("name: [", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_config(path)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config"):
        load_config(tmp_path / "gone.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read config"):
        load_config(tmp_path / "binary.yaml")


# -- sections that do not fit each other ----------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.loss.hard=dataset"], "loss.hard 'dataset' needs label.mode 'score'"),
        (["label.mode=score"], "loss.hard 'sampled' needs label.mode 'generate'"),
        (["label.mode=score", "label.sampling.seed=1"], "sampling has no effect in score mode"),
        (["train=null", "students.a={}"], "the section train is missing"),
        (["students.x.loss.hard=dataset"], "student 'x': loss.hard 'dataset'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    file: Path, overrides: list[str], expected: str
) -> None:
    assert expected in problem(file, *overrides)


@pytest.mark.parametrize("hard", ["dataset", "argmax"])
def test_scored_labels_have_dataset_and_argmax_tokens(file: Path, hard: str) -> None:
    loaded = load_config(file, ["label.mode=score", f"train.loss.hard={hard}"])
    assert loaded.student_configs()["student"].loss.hard == hard


# -- overriding -----------------------------------------------------------------------------------
def test_overrides_are_applied_from_left_to_right(file: Path) -> None:
    loaded = load_config(file, ["name=a", "name=b", "label.kind.k=7"])
    assert loaded.name == "b"
    assert loaded.label.kind.k == 7


@pytest.mark.parametrize(
    ("text", "value"),
    [("1.0e-3", 0.001), ("0.001", 0.001), (" 0.5 ", 0.5)],
)
def test_an_override_is_a_yaml_value(file: Path, text: str, value: float) -> None:
    train = load_config(file, [f"train.optimizer.lr={text}"]).train
    assert train is not None
    assert train.optimizer.lr == value


def test_an_override_keeps_equal_signs_in_its_value(file: Path) -> None:
    assert load_config(file, ["store=s3://bucket/a=b"]).store == "s3://bucket/a=b"


def test_an_override_of_a_section_keeps_the_rest_of_it(file: Path) -> None:
    backend = load_config(file, ["teacher.backend.threads=2"]).teacher.backend
    assert isinstance(backend, VllmBackendConfig)
    assert (backend.threads, backend.max_num_seqs) == (2, 3)


@pytest.mark.parametrize("override", ["name", "=x", " =x", "a=["])
def test_an_override_of_the_wrong_form_is_refused(file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(file, [override])


def test_another_type_starts_its_section_anew(file: Path) -> None:
    """``max_num_seqs`` means nothing to transformers, and would be an unknown key there."""
    backend = load_config(file, ["teacher.backend.type=transformers"]).teacher.backend
    assert backend == TransformersBackendConfig()


def test_text_in_place_of_a_section_replaces_it(file: Path) -> None:
    train = load_config(file, ["train.model=./student"]).train
    assert train is not None
    assert train.model == "./student"


def test_dotted_keys_mean_nested_sections() -> None:
    found = expand_dotted_keys({"a.b": 1, "a": {"c": 2, "d.e": 3}, "f": [4]})
    assert found == {"a": {"b": 1, "c": 2, "d": {"e": 3}}, "f": [4]}


def test_merging_leaves_its_arguments_alone() -> None:
    base, change = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(base, change) == {"a": {"b": 1, "c": 2}}
    assert (base, change) == ({"a": {"b": 1}}, {"a": {"c": 2}})


# -- students -------------------------------------------------------------------------------------
def test_without_students_one_is_trained_as_train_says(file: Path) -> None:
    loaded = load_config(file)
    assert loaded.student_configs() == {"student": loaded.train}


def test_students_are_train_with_their_own_changes(file: Path) -> None:
    with file.open("a") as stream:
        stream.write("students:\n")
        stream.write("  hard: {loss.weight.soft_weight: 0.0}\n")
        stream.write("  longer: {epochs: 3, optimizer: {lr: 0.5}}\n")
    configs = load_config(file, ["train.seed=5"]).student_configs()
    assert configs["hard"].loss.weight.soft_weight == 0.0
    assert (configs["longer"].epochs, configs["longer"].optimizer.lr) == (3, 0.5)
    for config in configs.values():
        assert config.seed == 5
        assert config.model == PrunedModelConfig(keep_layers=(0, 2))


def test_a_student_that_is_null_is_left_out(file: Path) -> None:
    loaded = load_config(file, ["students={a: {epochs: 2}, b: {epochs: 3}}", "students.b=null"])
    assert list(loaded.student_configs()) == ["a"]


def test_the_name_of_a_student_may_hold_a_dot(file: Path) -> None:
    with file.open("a") as stream:
        stream.write("students: {qwen-0.5b: {loss.weight.soft_weight: 0.25}}\n")
    (student,) = load_config(file).student_configs().items()
    assert student[0] == "qwen-0.5b"
    assert student[1].loss.weight.soft_weight == 0.25


# -- the schema -----------------------------------------------------------------------------------
def test_a_config_is_the_same_after_a_round_trip_through_json(file: Path) -> None:
    loaded = load_config(file, ["students.a.epochs=2"])
    assert RunConfig.model_validate(json.loads(loaded.model_dump_json())) == loaded


@pytest.mark.parametrize("section", SECTIONS, ids=lambda model: model.__name__)
def test_every_setting_has_a_description(section: type[BaseModel]) -> None:
    undescribed = [
        name
        for name, field in section.model_fields.items()
        if not field.description and name != "type"
    ]
    assert undescribed == []
    assert section.__doc__


def test_the_schema_is_json_and_covers_every_setting() -> None:
    schema = json.loads(json.dumps(RunConfig.model_json_schema()))
    described = {"RunConfig": schema, **schema["$defs"]}
    assert set(described) == {section.__name__ for section in SECTIONS}
    for section in SECTIONS:
        found = described[section.__name__]
        assert set(found["properties"]) == set(section.model_fields)
        assert found["additionalProperties"] is False


# -- sweeps ---------------------------------------------------------------------------------------
def test_a_sweep_adds_students_to_those_that_are_named(file: Path) -> None:
    loaded = load_config(
        file, ["students={a: {epochs: 2}}", "sweep.grid.loss.weight.soft_weight=[0.25, 0.75]"]
    )
    configs = loaded.student_configs()
    assert list(configs) == ["a", "soft_weight-0.25", "soft_weight-0.75"]
    assert configs["soft_weight-0.75"].loss.weight.soft_weight == 0.75


def test_a_sweep_alone_has_no_student_of_the_unchanged_settings(file: Path) -> None:
    assert list(load_config(file, ["sweep.list=[{epochs: 3}]"]).student_configs()) == ["epochs-3"]


def test_a_point_that_the_settings_refuse_is_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"students\.epochs-0: epochs"):
        load_config(file, ["sweep.grid.epochs=[1, 0]"])


def test_a_name_of_the_sweep_cannot_be_that_of_a_student(file: Path) -> None:
    with pytest.raises(ConfigError, match="'epochs-2' is in students and in the sweep"):
        load_config(file, ["students.epochs-2={}", "sweep.grid.epochs=[2]"])
