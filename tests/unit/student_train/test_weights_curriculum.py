"""A ramp over the first steps."""

from typing import Any

import pytest

from tests.unit.student_train.weight_rows import EXACT, UNIFORM, rows_of, weigh


def ramp(reverse: bool, **options: Any) -> list[float]:
    rows = rows_of(UNIFORM)
    return [
        float(weigh(rows, "curriculum", step=step, reverse=reverse, **options).soft_M)
        for step in range(10)
    ]


def test_the_curriculum_rises_linearly_to_its_weight() -> None:
    # 0.4 * 10 = 4 steps of ramp
    expected = [0.0, 0.15, 0.3, 0.45, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    assert ramp(False, soft_weight=0.6, warmup_ratio=0.4) == pytest.approx(expected, abs=EXACT)


def test_the_reverse_curriculum_falls_from_one_to_the_same_weight() -> None:
    expected = [1.0, 0.9, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    assert ramp(True, soft_weight=0.6, warmup_ratio=0.4) == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("reverse", [True, False])
def test_a_curriculum_without_a_ramp_is_static(reverse: bool) -> None:
    assert ramp(reverse, soft_weight=0.5, warmup_ratio=0.0) == [0.5] * 10
