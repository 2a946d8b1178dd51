"""How far the student is behind the teacher on the hard label."""

import math

import pytest
import torch

from tests.unit.student_train.weight_rows import ONE_HOT, random_teachers, rows_of, weigh


@pytest.mark.parametrize("reverse", [False, True])
def test_wsl_compares_the_losses_on_the_hard_label(reverse: bool) -> None:
    rows = rows_of(random_teachers(6))
    student_M = torch.linspace(-12.0, -0.1, 6, dtype=torch.float64)
    assert rows.token_logprob_M is not None
    ratio_M = (student_M / rows.token_logprob_M).clamp(-10, 10)
    expected_M = 0.4 * (torch.exp(-ratio_M) if reverse else 1 - torch.exp(-ratio_M))
    found = weigh(
        rows, "wsl", soft_weight=0.4, student_logprob_M=student_M.float(), reverse=reverse
    )
    torch.testing.assert_close(found.soft_M, expected_M, rtol=1e-6, atol=1e-6)
    assert found.hard_M.tolist() == [1.0] * 6  # the hard term is not reduced


@pytest.mark.parametrize(
    ("student", "expected"), [(0.0, 0.0), (-1e-3, 0.2 * (1 - math.exp(-10))), (-5.0, 0.2)]
)
def test_wsl_with_a_teacher_that_is_certain(student: float, expected: float) -> None:
    """Both losses zero: nothing to learn. Else as behind as a student can be."""
    rows = rows_of(ONE_HOT, hard_M=torch.zeros(1, dtype=torch.long))
    found = weigh(rows, "wsl", student_logprob_M=torch.full((1,), student))
    assert found.soft_M.item() == pytest.approx(expected, abs=1e-4)
