"""The spread of whole distributions, by Shannon and by power sums."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from student_train.weights.config import POWER_SUM_COLUMNS
from tests.unit.student_train.weight_rows import (
    UNIFORM,
    V,
    assert_blend,
    config_of,
    random_teachers,
    rows_of,
    weigh,
)


def test_entropy_is_that_of_shannon_over_its_largest_value() -> None:
    p_MV = random_teachers(6)
    expected_M = torch.distributions.Categorical(probs=p_MV).entropy() / math.log(V)
    assert_blend(weigh(rows_of(p_MV), "entropy"), expected_M)


@pytest.mark.parametrize("gamma", sorted(POWER_SUM_COLUMNS))
def test_the_power_sum_is_scaled_between_one_hot_and_uniform(gamma: float) -> None:
    p_MV = random_teachers(6)
    expected_M = ((p_MV**gamma).sum(dim=-1) - 1) / (V ** (1 - gamma) - 1)
    found = weigh(rows_of(p_MV), "entropy", measure="power_sum", gamma=gamma)
    assert_blend(found, expected_M)


@pytest.mark.parametrize("measure", ["shannon", "power_sum"])
def test_a_uniform_teacher_leaves_nothing_to_the_hard_labels(measure: str) -> None:
    assert_blend(weigh(rows_of(UNIFORM), "entropy", measure=measure), [1.0])


@pytest.mark.parametrize("measure", ["shannon", "power_sum"])
def test_sums_over_a_padded_output_layer_count_as_one_at_most(measure: str) -> None:
    """The engine sums over 30 rows, of which the labels know 20."""
    found = weigh(rows_of(UNIFORM), "entropy", measure=measure, vocab_size=20)
    assert found.soft_M.tolist() == [1.0]


def test_a_scale_in_nats_replaces_the_largest_entropy() -> None:
    rows = rows_of(random_teachers(6))
    assert rows.entropy_M is not None
    found = weigh(rows, "entropy", scale_nats=2.0)
    assert_blend(found, (rows.entropy_M / 2).clamp_max(1))
    assert found.soft_M.max() == 1  # some of these teachers are flatter than that


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"gamma": 0.5}, "gamma belongs to measure 'power_sum'"),
        ({"measure": "power_sum", "scale_nats": 1.0}, "scale_nats belongs to measure 'shannon'"),
        ({"measure": "power_sum", "gamma": 0.3}, "use 0.1, 0.25, 0.5, 0.75"),
    ],
)
def test_options_of_the_other_measure_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        config_of("entropy", **options)
