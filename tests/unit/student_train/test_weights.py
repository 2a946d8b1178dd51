"""What holds for every weight policy."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from student_train.weights import WEIGHT_POLICIES
from student_train.weights.config import WeightConfig
from tests.unit.student_train.weight_rows import (
    V,
    assert_blend,
    config_of,
    random_teachers,
    rows_of,
    weigh,
)

REVERSIBLE = ("confidence", "entropy", "sidecar")
"""Policies whose reverse is one minus the weight."""


def test_every_type_of_the_configuration_is_a_policy_and_the_other_way_round() -> None:
    schema = TypeAdapter(WeightConfig).json_schema()
    assert sorted(schema["discriminator"]["mapping"]) == sorted(WEIGHT_POLICIES)


@pytest.mark.parametrize("name", sorted(WEIGHT_POLICIES))
@given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
    k=st.integers(1, V),
    step=st.integers(0, 10),
    student=st.sampled_from([0.0, -1e-30, -3.0, -1e4]),
    reverse=st.booleans(),
)
def test_weights_lie_between_zero_and_one(
    name: str, seed: int, scale: float, k: int, step: int, student: float, reverse: bool
) -> None:
    """Flat and certain teachers, with and without a tail, certain and hopeless students."""
    rows = rows_of(random_teachers(4, seed=seed, scale=scale), k=k)
    options = {"reverse": reverse} if "reverse" in type(config_of(name)).model_fields else {}
    student_M = torch.full_like(rows.log_tail_mass_M, student)
    found = weigh(rows, name, step=step, student_logprob_M=student_M, **options)
    for weights_M in (found.soft_M, found.hard_M):
        assert weights_M.shape == (4,)
        assert ((weights_M >= 0) & (weights_M <= 1)).all()


@pytest.mark.parametrize("name", sorted(WEIGHT_POLICIES))
def test_no_rows_have_no_weights(name: str) -> None:
    assert weigh(rows_of(random_teachers(3)).rows(0, 0), name).soft_M.shape == (0,)


@pytest.mark.parametrize("name", REVERSIBLE)
def test_the_reverse_is_the_complement(name: str) -> None:
    rows = rows_of(random_teachers(6))
    forwards, backwards = weigh(rows, name), weigh(rows, name, reverse=True)
    assert_blend(backwards, 1 - forwards.soft_M)


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({"type": "static"}, set()),
        ({"type": "confidence", "of": "label"}, set()),
        ({"type": "ambiguity"}, set()),
        ({"type": "curriculum"}, set()),
        ({"type": "wsl"}, set()),
        ({"type": "entropy"}, {"entropy"}),
        ({"type": "entropy", "measure": "power_sum"}, {"power_sum_10"}),
        ({"type": "entropy", "measure": "power_sum", "gamma": 0.5}, {"power_sums"}),
    ],
    ids=str,
)
def test_a_policy_names_the_label_columns_that_it_needs(
    options: dict[str, Any], columns: set[str]
) -> None:
    assert config_of(**{"name": options.pop("type"), **options}).required_columns == columns
