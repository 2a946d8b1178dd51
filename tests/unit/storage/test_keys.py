"""Identity: a key changes with everything that can change a label, and with nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from storage.errors import UnstableValueError
from storage.keys import (
    PROMPT_HEX_DIGITS,
    CountsSpec,
    GenerationSpec,
    LabelSetSpec,
    MassSpec,
    SamplingSpec,
    StratifiedSpec,
    TeacherFingerprint,
    ThresholdSpec,
    TopKSpec,
    canonical_columns,
    canonical_json,
    key_of,
    prompt_key,
    sample_key,
    sampling_seed,
)
from storage.testing import make_spec

ROOT = Path(__file__).resolve().parents[3]

WHERE: dict[type[BaseModel], tuple[str, ...]] = {
    LabelSetSpec: (),
    TopKSpec: ("kind",),
    GenerationSpec: ("generation",),
    TeacherFingerprint: ("generation", "teacher"),
    SamplingSpec: ("generation", "sampling"),
}
"""Path from a label set spec to the part of each class."""

OTHER_TEACHER = TeacherFingerprint(weights="x" * 32, config="c" * 32)
ANOTHER_VALUE: dict[tuple[type[BaseModel], str], object] = {
    (LabelSetSpec, "generation"): make_spec(seed=1).generation,
    (LabelSetSpec, "kind"): TopKSpec(k=9),
    (LabelSetSpec, "columns"): (),
    (LabelSetSpec, "tail"): "topk",
    (LabelSetSpec, "vocab_size"): 101,
    (TopKSpec, "type"): "another",
    (TopKSpec, "k"): 9,
    (GenerationSpec, "teacher"): OTHER_TEACHER,
    (GenerationSpec, "mode"): "score",
    (GenerationSpec, "compute_dtype"): "bfloat16",
    (GenerationSpec, "head_dtype"): "bfloat16",
    (GenerationSpec, "sampling"): None,
    (GenerationSpec, "tokenizer"): "t" * 32,
    (TeacherFingerprint, "weights"): "x" * 32,
    (TeacherFingerprint, "config"): "x" * 32,
    (TeacherFingerprint, "quantization"): "fp8",
    (TeacherFingerprint, "adapters"): ("a" * 32,),
    (TeacherFingerprint, "trust_remote_code"): True,
    (SamplingSpec, "temperature"): 0.7,
    (SamplingSpec, "top_p"): 0.9,
    (SamplingSpec, "top_k"): 50,
    (SamplingSpec, "min_p"): 0.1,
    (SamplingSpec, "max_tokens"): 17,
    (SamplingSpec, "stop"): ("\n",),
    (SamplingSpec, "seed"): 1,
}

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
IDS = st.lists(st.integers(0, 2**20 - 1), max_size=8)


def replaced(spec: LabelSetSpec, part: type[BaseModel], field: str, value: object) -> LabelSetSpec:
    """``spec`` with one field of one of its parts changed."""
    parts: list[BaseModel] = [spec]
    for name in WHERE[part]:
        parts.append(getattr(parts[-1], name))
    changed = parts[-1].model_copy(update={field: value})
    for parent, name in zip(reversed(parts[:-1]), reversed(WHERE[part]), strict=True):
        changed = parent.model_copy(update={name: changed})
    assert isinstance(changed, LabelSetSpec)
    return changed


def test_keys_are_pinned() -> None:
    """A change here orphans every label set in the world: it needs a new KEY_VERSION."""
    spec = make_spec()
    assert spec.key == "2017621b5beab5a39ec105b190133aba"
    assert spec.generation.key == "e2c17bdf9f5f2b88708aa917f4078167"
    assert prompt_key([1, 2, 3]) == "05bb47e0fa3ccf258de905de5a5eacc7"
    assert sample_key([1, 2, 3], 0) == "05bb47e075415ac7b915353ec04912f4"
    assert sample_key([1, 2, 3], 0, response_ids=[4, 5]) == "05bb47e02935cd78d477269222f6fb95"
    assert (
        sample_key([1, 2, 3], 0, response_ids=[4, 5], label_mask=[0, 1])
        == "05bb47e0c881276a0cedeb8504303cf9"
    )
    assert sampling_seed(0, sample_key([1, 2, 3], 0)) == 914774844041005146


def test_canonical_json_is_pinned() -> None:
    value = {"b": 1, "a": [1.0, None, True, "\u00e9"], "c": {"z": (), "y": 1e-7}}
    assert canonical_json(value) == ('{"a":[1.0,null,true,"\\u00e9"],"b":1,"c":{"y":1e-07,"z":[]}}')


@pytest.mark.parametrize(
    ("part", "field"), [(part, field) for part in WHERE for field in part.model_fields]
)
def test_every_field_changes_the_label_set_key(part: type[BaseModel], field: str) -> None:
    spec = make_spec()
    assert replaced(spec, part, field, ANOTHER_VALUE[part, field]).key != spec.key


@pytest.mark.parametrize(
    ("part", "field"),
    [
        (part, field)
        for part in (GenerationSpec, TeacherFingerprint, SamplingSpec)
        for field in part.model_fields
    ],
)
def test_every_generation_field_changes_the_generation_key(
    part: type[BaseModel], field: str
) -> None:
    spec = make_spec()
    changed = replaced(spec, part, field, ANOTHER_VALUE[part, field])
    assert changed.generation.key != spec.generation.key


def test_label_kind_and_columns_leave_the_generation_key_alone() -> None:
    small, large = make_spec(k=4), make_spec(k=64)
    assert small.key != large.key
    assert small.generation.key == large.generation.key


def test_a_key_is_the_same_in_another_process() -> None:
    program = "from storage.testing import make_spec; print(make_spec().key)"
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == make_spec().key


@given(st.dictionaries(st.text(), JSON, max_size=6), st.randoms())
def test_canonical_json_ignores_the_order_of_fields(value: dict[str, object], random) -> None:
    names = list(value)
    random.shuffle(names)
    assert canonical_json({name: value[name] for name in names}) == canonical_json(value)


@given(JSON, JSON)
def test_different_values_have_different_canonical_json(one: object, other: object) -> None:
    """``repr`` tells 1 from 1.0 and True, which ``==`` does not; -0.0 and 0.0 are one value."""
    same = repr(normalized(one)) == repr(normalized(other))
    assert (canonical_json(one) == canonical_json(other)) == same


def normalized(value: object) -> object:
    if isinstance(value, dict):
        return {name: normalized(value[name]) for name in sorted(value)}
    if isinstance(value, list):
        return [normalized(item) for item in value]
    return value + 0.0 if isinstance(value, float) else value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(UnstableValueError, match=r"\$\.a\[1\] must be finite to enter a key"):
        key_of({"a": [0.0, value]})


@pytest.mark.parametrize("value", [object(), len, {1, 2}, b"bytes", np.float32(1.0), Path("x")])
def test_values_without_a_stable_form_are_refused(value: object) -> None:
    with pytest.raises(UnstableValueError, match=r"\$\.a is a .*no stable form"):
        key_of({"a": value})


@pytest.mark.parametrize("name", [1, None, ("a", "b")])
def test_keys_of_mappings_must_be_text(name: object) -> None:
    with pytest.raises(UnstableValueError, match="keys must be strings"):
        key_of({name: 1})


@given(IDS, st.integers(0, 100))
def test_a_sample_key_does_not_depend_on_how_its_ids_are_held(ids: list[int], index: int) -> None:
    expected = sample_key(ids, index)
    for dtype in (np.int32, np.int64, np.uint32, ">i4"):
        assert sample_key(np.array(ids, dtype=dtype), index) == expected
    assert sample_key(np.repeat(np.array(ids, dtype=np.int32), 2)[::2], index) == expected


@given(st.tuples(IDS, st.integers(0, 9), IDS), st.tuples(IDS, st.integers(0, 9), IDS))
def test_different_samples_have_different_keys(
    one: tuple[list[int], int, list[int]], other: tuple[list[int], int, list[int]]
) -> None:
    same = one == other
    assert (sample_key(*one[:2]) == sample_key(*other[:2])) == (one[:2] == other[:2])
    assert (
        sample_key(*one[:2], response_ids=one[2]) == sample_key(*other[:2], response_ids=other[2])
    ) == same


@given(IDS, IDS)
def test_moving_a_token_from_prompt_to_response_changes_the_key(
    prompt: list[int], response: list[int]
) -> None:
    moved = sample_key([*prompt, 7], 0, response_ids=response)
    assert sample_key(prompt, 0, response_ids=[7, *response]) != moved


def test_a_given_response_is_another_sample_than_a_generated_one() -> None:
    assert sample_key([1], 0) != sample_key([1], 0, response_ids=[])


def test_no_label_mask_means_every_position() -> None:
    assert sample_key([1], 0, response_ids=[2, 3]) == sample_key(
        [1], 0, response_ids=[2, 3], label_mask=np.array([True, True])
    )


@given(IDS, st.integers(0, 9), st.none() | IDS)
def test_a_sample_key_begins_like_the_key_of_its_prompt(
    prompt: list[int], index: int, response: list[int] | None
) -> None:
    """8 hex digits, 32 bits: samples of a prompt are neighbours and never leave its partition."""
    key = sample_key(prompt, index, response_ids=response)
    assert PROMPT_HEX_DIGITS == 8
    assert key[:8] == prompt_key(prompt)[:8]
    assert key[8:] != prompt_key(prompt)[8:]


def test_the_options_of_every_kind_change_the_label_set_key() -> None:
    kinds = [TopKSpec(k=64), MassSpec(), MassSpec(mass=0.99), MassSpec(cap=32)]
    keys = {make_spec().model_copy(update={"kind": kind}).key for kind in kinds}
    assert len(keys) == 4
    assert [kind.width for kind in kinds] == [64, 64, 64, 32]


# -- optional columns ------------------------------------------------------------------------------
STRATIFIED = {"type": "stratified", "draws": 4}
THRESHOLD = {"type": "threshold", "threshold": 0.02}
COUNTS = {"type": "counts", "draws": 50}


def with_columns(*columns: object) -> LabelSetSpec:
    return LabelSetSpec.model_validate({**make_spec().model_dump(), "columns": columns})


def test_keys_of_optional_columns_are_pinned() -> None:
    """Those of sets without new columns are in ``test_keys_are_pinned`` and the golden store."""
    found = {
        columns: with_columns(*columns).key
        for columns in [
            *((), ("entropy",), ("entropy", "power_sum_10", "power_sums")),
            ("power_sum_200", "power_sum_400"),
        ]
    }
    assert found == {
        (): "46f1f772bdf19e1d025f35f633a1bb4e",
        ("entropy",): "2017621b5beab5a39ec105b190133aba",
        ("entropy", "power_sum_10", "power_sums"): "e2a63e542d29ad48c9de67d7510c8eb3",
        ("power_sum_200", "power_sum_400"): "3767da3a06521e422c82ff07db357aca",
    }
    assert with_columns("entropy", "power_sums", STRATIFIED).key == (
        "2a6c398cdffa6aec6e1134c3950fdf5b"
    )


def test_every_option_of_tail_samples_changes_the_key() -> None:
    changed = [
        *(STRATIFIED, {**STRATIFIED, "draws": 5}),
        *(THRESHOLD, {**THRESHOLD, "threshold": 0.03}),
        *(COUNTS, {**COUNTS, "draws": 4}),
    ]
    keys = {with_columns("entropy", sampled).key for sampled in changed}
    assert len(keys | {with_columns("entropy").key}) == 7


def test_a_spec_with_tail_samples_survives_its_document() -> None:
    spec = with_columns("entropy", THRESHOLD)
    assert spec.tail_samples == ThresholdSpec(threshold=0.02)
    assert with_columns("entropy").tail_samples is None
    again = LabelSetSpec.model_validate_json(canonical_json(spec))
    assert (again, again.key) == (spec, spec.key)
    assert '"columns":["entropy",{"threshold":0.02,"type":"threshold"}]' in canonical_json(spec)


@given(
    st.permutations(["entropy", "power_sums", "power_sum_10", StratifiedSpec(draws=3), "entropy"])
)
def test_columns_in_any_order_are_one_request(columns: list[object]) -> None:
    assert canonical_columns(columns) == (
        *("entropy", "power_sum_10", "power_sums"),
        StratifiedSpec(draws=3),
    )


def test_tail_samples_of_two_kinds_do_not_fit_one_set() -> None:
    two = [StratifiedSpec(draws=3), CountsSpec(draws=3)]
    with pytest.raises(ValueError, match=r"holds tail samples of one kind, got .*; choose one"):
        canonical_columns(two)
    with pytest.raises(ValueError, match="tail samples of one kind"):
        with_columns(STRATIFIED, COUNTS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("entropy", "entropy"), "columns must be distinct"),
        (("power_sums", "entropy"), "columns must be distinct, names sorted, tail samples last"),
        ((STRATIFIED, "entropy"), "tail samples last"),
        (("z", "entropy"), "Input should be 'entropy', 'power_sum_10', 'power_sum_200'"),
        (({"type": "reservoir", "draws": 3},), "a column is a name .* or a section with the type"),
        (({"draws": 3},), "a column is a name"),
        ((3,), "a column is a name"),
        (({"type": "stratified", "draws": 0},), "greater than or equal to 1"),
        (({"type": "stratified", "draws": 1025},), "less than or equal to 1024"),
        (({"type": "counts"},), "Field required"),
        (({**COUNTS, "threshold": 0.1},), "Extra inputs are not permitted"),
        (({"type": "threshold", "threshold": 1.0},), "less than 1"),
        (({"type": "threshold", "threshold": 0.0009},), "greater than or equal to"),
    ],
)
def test_columns_that_make_no_request_are_refused(
    columns: tuple[object, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        with_columns(*columns)


def test_the_most_tokens_that_tail_samples_keep() -> None:
    assert StratifiedSpec(draws=7).width == CountsSpec(draws=7).width == 7
    # 100 intervals of 0.01 have a 101st point where probabilities add up to a little more than 1
    assert ThresholdSpec(threshold=0.01).width == 101
    assert ThresholdSpec(threshold=0.3).width == 4


def test_a_prompt_key_is_not_the_key_of_its_first_sample() -> None:
    assert prompt_key([1, 2]) != sample_key([1, 2], 0)


@given(st.integers(0, 2**63 - 1), IDS)
def test_sampling_seeds_fit_a_signed_64_bit_integer(seed: int, ids: list[int]) -> None:
    assert 0 <= sampling_seed(seed, sample_key(ids, 0)) < 2**63


def test_sampling_seeds_differ_between_samples_and_between_requests() -> None:
    keys = [sample_key([prompt], index) for prompt in range(10) for index in range(10)]
    seeds = {sampling_seed(seed, key) for seed in (0, 1) for key in keys}
    assert len(seeds) == 200  # 2 requests x 100 samples
