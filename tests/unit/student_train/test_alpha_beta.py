"""Alpha-beta divergence: its special cases, its limits, and where it needs a floor."""

import math

import pytest
import torch
from torch import Tensor

from student_train.losses.alpha_beta import LIMIT, alpha_beta
from student_train.losses.forward_kl import forward_kl
from student_train.losses.reverse_kl import reverse_kl

FLOOR = -30.0
TEACHER = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64).log()


def found(alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    return alpha_beta(TEACHER, STUDENT, alpha=alpha, beta=beta, log_floor=FLOOR)


def test_one_and_zero_is_forward_kl() -> None:
    value, gradient = found(1.0, 0.0)
    expected, slope = forward_kl(TEACHER, STUDENT)
    torch.testing.assert_close(value, expected)
    # its terms are p log(p/q) - p + q: what they add has no gradient once q sums to one
    torch.testing.assert_close(gradient, slope + STUDENT.exp())


def test_zero_and_one_is_reverse_kl() -> None:
    value, gradient = found(0.0, 1.0)
    expected, slope = reverse_kl(TEACHER, STUDENT, log_floor=FLOOR)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, slope - STUDENT.exp())


def test_one_and_one_is_half_the_squared_difference_of_probabilities() -> None:
    expected = (TEACHER.exp() - STUDENT.exp()).square().sum(dim=-1) / 2
    torch.testing.assert_close(found(1.0, 1.0)[0], expected)


def test_halves_are_four_times_the_squared_hellinger_distance() -> None:
    overlap = ((TEACHER + STUDENT) / 2).exp().sum(dim=-1)
    torch.testing.assert_close(found(0.5, 0.5)[0], 4 * (1 - overlap))


def test_zeros_are_half_the_squared_difference_of_log_probs() -> None:
    expected = (TEACHER - STUDENT).square().sum(dim=-1) / 2
    torch.testing.assert_close(found(0.0, 0.0)[0], expected)


@pytest.mark.parametrize(
    ("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.0, 0.3), (0.4, -0.4), (0.0, 0.0)]
)
def test_the_limits_are_approached_from_both_sides(alpha: float, beta: float) -> None:
    """A step of 1e-4 changes value and gradient by about that; a wrong limit by much more."""
    exact = found(alpha, beta)
    for step in (1e-4, -1e-4, 2 * LIMIT, -2 * LIMIT):
        for near in (found(alpha + step, beta), found(alpha, beta + step)):
            for one, other in zip(near, exact, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=20 * abs(step) + 1e-4 * LIMIT)


def test_near_the_limit_nothing_is_lost_to_cancellation() -> None:
    """The general formula divides by alpha * beta; float32 inputs are computed in float64."""
    single = alpha_beta(TEACHER.float(), STUDENT.float(), alpha=1.0, beta=1e-5, log_floor=FLOOR)
    torch.testing.assert_close(single[0].double(), found(1.0, 0.0)[0], rtol=0, atol=1e-4)


def test_a_floor_holds_only_where_an_exponent_asks_for_it() -> None:
    teacher = torch.tensor([[1.0, 0.0]], dtype=torch.float64).log()
    student = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    for alpha, beta, uses_floor in ((0.2, 0.7, False), (1.0, 0.0, False), (0.0, 1.0, True)):
        values = [
            float(alpha_beta(teacher, student, alpha=alpha, beta=beta, log_floor=floor)[0])
            for floor in (-10.0, -30.0)
        ]
        assert all(map(math.isfinite, values))
        assert (values[0] != values[1]) == uses_floor


def test_a_student_below_the_floor_gets_no_gradient_where_the_floor_holds() -> None:
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    student = torch.tensor([[0.0, -50.0]], dtype=torch.float64)
    value, gradient = alpha_beta(teacher, student, alpha=1.5, beta=-0.5, log_floor=FLOOR)
    assert bool(torch.isfinite(value).all())
    assert float(gradient[0, 1]) == 0.0
