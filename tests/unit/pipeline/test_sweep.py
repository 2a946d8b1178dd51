"""Sweeps become students."""

import math
import re
from itertools import combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.sweep import MAX_STUDENTS, SweepConfig

STUDENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def students(**sections: object) -> dict[str, dict[str, object]]:
    return SweepConfig.model_validate(sections).students()


def test_a_grid_is_every_combination_and_the_last_axis_is_fastest() -> None:
    found = students(grid={"loss": {"weight": {"soft_weight": [0.2, 0.8]}}, "epochs": [1, 2]})
    assert list(found) == [
        "soft_weight-0.2_epochs-1",
        "soft_weight-0.2_epochs-2",
        "soft_weight-0.8_epochs-1",
        "soft_weight-0.8_epochs-2",
    ]
    assert found["soft_weight-0.8_epochs-1"] == {
        "loss": {"weight": {"soft_weight": 0.8}},
        "epochs": 1,
    }


def test_a_list_is_one_student_each_and_dots_separate() -> None:
    found = students(list=[{"loss.weight.soft_weight": 0.5, "epochs": 3}, {"loss.hard": "argmax"}])
    assert found == {
        "soft_weight-0.5_epochs-3": {"loss": {"weight": {"soft_weight": 0.5}}, "epochs": 3},
        "hard-argmax": {"loss": {"hard": "argmax"}},
    }


def test_the_grid_comes_before_the_list() -> None:
    assert list(students(grid={"epochs": [1]}, list=[{"epochs": 2}])) == ["epochs-1", "epochs-2"]


def test_settings_whose_last_names_are_alike_keep_more_of_their_path() -> None:
    found = students(grid={"loss.weight.type": ["static"], "loss.soft.type": ["taid"]})
    assert list(found) == ["weight.type-static_soft.type-taid"]


def test_a_section_as_a_value_is_called_by_its_type() -> None:
    found = students(grid={"loss.soft": [{"type": "taid"}, {"type": "jsd", "beta": 0.1}]})
    assert list(found) == ["soft-taid", "soft-jsd-beta-0.1"]
    assert found["soft-jsd-beta-0.1"] == {"loss": {"soft": {"type": "jsd", "beta": 0.1}}}


def test_a_change_of_nothing_is_the_base_itself() -> None:
    assert students(list=[{}, {"epochs": 2}]) == {"unchanged": {}, "epochs-2": {"epochs": 2}}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, "needs a grid or a list"),
        ({"grid": {"epochs": 2}}, "epochs must be a list of values with at least one, found 2"),
        ({"grid": {"loss": {"hard": []}}}, r"loss.hard must be a list .* found \[\]"),
    ],
)
def test_what_is_no_sweep_is_refused(sections: dict[str, object], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        SweepConfig.model_validate(sections)


def test_names_tell_signs_and_exponents_apart() -> None:
    found = students(grid={"a": [1, -1, 1e22, 1e-22]})
    assert list(found) == ["a-1", "a-minus-1", "a-1e22", "a-1e-22"]


def test_the_same_point_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'epochs-1' is there twice"):
        students(grid={"epochs": [1, 1]})


def test_a_grid_out_of_bounds_is_refused_before_it_is_made() -> None:
    axis = list(range(1000))
    with pytest.raises(ValueError, match=f"1000000000000 points, at most {MAX_STUDENTS}"):
        students(grid={"a": axis, "b": axis, "c": axis, "d": axis})


values = st.one_of(st.floats(allow_nan=False), st.integers(), st.text(max_size=5), st.none())


@given(
    st.dictionaries(st.sampled_from("abc"), st.lists(values, min_size=1, max_size=3), min_size=1)
)
def test_names_are_names_of_students_and_no_point_is_lost(axes: dict[str, list[object]]) -> None:
    distinct = all(a != b for points in axes.values() for a, b in combinations(points, 2))
    assume(distinct)
    found = students(grid=axes)
    assert len(found) == math.prod(map(len, axes.values()))
    assert all(STUDENT_NAME.fullmatch(name) for name in found)
