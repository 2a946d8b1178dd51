"""What changes the address of the labels, and what does not."""

from typing import Any

import pytest
from pydantic import ValidationError

from storage.errors import ConfigError
from storage.keys import LabelSetSpec, MassSpec, TeacherFingerprint, ThresholdSpec, TopKSpec
from teacher_server.config import (
    DataConfig,
    GgufModelConfig,
    LabelConfig,
    TeacherConfig,
    label_set_spec,
)

FINGERPRINT = TeacherFingerprint(weights="w" * 32, config="c" * 32)


def spec(
    teacher: dict[str, Any] | None = None, label: dict[str, Any] | None = None, **changes: Any
) -> LabelSetSpec:
    settings: dict[str, Any] = {
        "fingerprint": FINGERPRINT,
        "vocab_size": 1000,
        "tokenizer": "t",
        **changes,
    }
    return label_set_spec(
        TeacherConfig.model_validate({"model": "m", **(teacher or {})}),
        LabelConfig.model_validate(label or {}),
        **settings,
    )


BASE = spec().key


@pytest.mark.parametrize(
    "teacher",
    [
        {"model": "another/path"},
        {"model": {"type": "gguf", "path": "x.gguf"}},
        {"backend": {"type": "transformers"}},
        {"backend": {"type": "vllm", "replicas": 4}},
        {"backend": {"type": "vllm", "tensor_parallel": 2, "max_num_seqs": 3, "threads": 2}},
        {"backend": {"type": "vllm", "enforce_eager": True, "gpu_memory_utilization": 0.5}},
    ],
    ids=str,
)
def test_how_and_where_the_teacher_runs_does_not_change_the_key(teacher: dict[str, Any]) -> None:
    assert spec(teacher).key == BASE


@pytest.mark.parametrize(
    "label",
    [{"commit_samples": 7}, {"sampling": {"samples_per_prompt": 5}}],
    ids=str,
)
def test_how_much_is_labelled_does_not_change_the_key(label: dict[str, Any]) -> None:
    assert spec(label=label).key == BASE


@pytest.mark.parametrize(
    "teacher",
    [{"dtype": "float32"}, {"dtype": "float16"}, {"head_dtype": "same"}],
    ids=str,
)
def test_dtypes_change_the_key(teacher: dict[str, Any]) -> None:
    assert spec(teacher).key != BASE


@pytest.mark.parametrize(
    "label",
    [
        {"kind": {"k": 32}},
        {"kind": {"type": "mass", "cap": 64}},
        {"columns": []},
        {"columns": ["entropy", "power_sums"]},
        {"columns": ["entropy", {"type": "stratified", "draws": 2}]},
        {"mode": "score"},
        {"sampling": {"temperature": 0.7}},
        {"sampling": {"top_p": 0.9}},
        {"sampling": {"top_k": 50}},
        {"sampling": {"min_p": 0.05}},
        {"sampling": {"max_tokens": 512}},
        {"sampling": {"stop": ["\n\n"]}},
        {"sampling": {"seed": 1}},
    ],
    ids=str,
)
def test_what_is_recorded_and_how_answers_are_drawn_changes_the_key(label: dict[str, Any]) -> None:
    assert spec(label=label).key != BASE


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": TeacherFingerprint(weights="x" * 32, config="c" * 32)},
        {"fingerprint": TeacherFingerprint(weights="w" * 32, config="x" * 32)},
        {"vocab_size": 999},
    ],
    ids=str,
)
def test_the_teacher_by_content_changes_the_key(changes: dict[str, Any]) -> None:
    assert spec(**changes).key != BASE


def test_the_tokenizer_matters_only_where_stop_strings_are_searched() -> None:
    assert spec(tokenizer="other").key == BASE
    stop = {"sampling": {"stop": ["\n"]}}
    assert spec(label=stop).key != spec(label=stop, tokenizer="other").key


def test_the_head_in_the_dtype_of_the_trunk_has_one_name() -> None:
    one = spec({"dtype": "float32", "head_dtype": "same"})
    other = spec({"dtype": "float32", "head_dtype": "float32"})
    assert one.key == other.key


def test_made_up_labels_are_never_found_by_those_who_ask_for_a_real_teacher() -> None:
    assert spec({"backend": {"type": "fake"}}).key != BASE


def test_scored_labels_have_no_sampling() -> None:
    assert spec(label={"mode": "score"}).generation.sampling is None


def test_more_tokens_than_the_vocabulary_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"label\.kind\.k is 64, .* vocabulary has 63 tokens"):
        spec(vocab_size=63)
    assert spec(vocab_size=64).kind.width == 64
    mass = {"kind": {"type": "mass", "cap": 80}}
    with pytest.raises(ConfigError, match=r"label\.kind\.cap is 80, .* vocabulary has 79 tokens"):
        spec(label=mass, vocab_size=79)
    assert spec(label=mass, vocab_size=80).kind == MassSpec(mass=0.999, cap=80)


def test_a_kind_without_a_type_is_the_top_k() -> None:
    assert LabelConfig.model_validate({"kind": {"k": 7}}).kind == TopKSpec(k=7)
    assert LabelConfig().kind == TopKSpec(k=64)
    assert LabelConfig(kind=MassSpec(cap=9)).kind == MassSpec(cap=9)
    with pytest.raises(ValidationError, match=r"kind\.topk\.cap"):
        LabelConfig.model_validate({"kind": {"cap": 7}})


def test_columns_in_another_order_are_the_same_request() -> None:
    sampled = {"type": "threshold", "threshold": 0.02}
    one = {"columns": [sampled, "power_sums", "entropy", "power_sums"]}
    other = {"columns": ["entropy", "power_sums", sampled]}
    assert LabelConfig.model_validate(one) == LabelConfig.model_validate(other)
    found = spec(label=one)
    assert found.key == spec(label=other).key
    assert found.columns == ("entropy", "power_sums", ThresholdSpec(threshold=0.02))


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        (LabelConfig, {"mode": "rate"}),
        (LabelConfig, {"kind": {"k": 0}}),
        (LabelConfig, {"kind": {"k": 2000}}),
        (LabelConfig, {"kind": {"type": "dense"}}),
        (LabelConfig, {"kind": {"type": "mass", "mass": 1.0}}),
        (LabelConfig, {"columns": ["hidden"]}),
        (LabelConfig, {"columns": [{"type": "stratified"}]}),
        (
            LabelConfig,
            {"columns": [{"type": "stratified", "draws": 1}, {"type": "counts", "draws": 1}]},
        ),
        (LabelConfig, {"commit_samples": 0}),
        (LabelConfig, {"sampling": {"temperature": -1}}),
        (LabelConfig, {"sampling": {"top_p": 0}}),
        (LabelConfig, {"sampling": {"max_tokens": 0}}),
        (LabelConfig, {"sampling": {"samples_per_prompt": 0}}),
        (LabelConfig, {"mode": "score", "sampling": {"seed": 1}}),
        (TeacherConfig, {"model": "m", "backend": {"type": "sglang"}}),
        (TeacherConfig, {"model": "m", "backend": {"type": "vllm", "replicas": 0}}),
        (TeacherConfig, {"model": "m", "dtype": "int8"}),
        (TeacherConfig, {}),
        (DataConfig, {"train": []}),
        (DataConfig, {"train": [{"path": "p"}], "on_bad_row": "ignore"}),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(section: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        section.model_validate(changes)


@pytest.mark.parametrize("sources", [{}, {"path": "a.gguf", "package": "b"}])
def test_a_gguf_model_has_exactly_one_source(sources: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="give exactly one of path and package"):
        GgufModelConfig.model_validate(sources)
