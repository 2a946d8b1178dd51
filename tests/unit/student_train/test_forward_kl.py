"""Forward KL on categories: value, gradient and its ends."""

import math

import pytest
import torch

from student_train.losses.forward_kl import forward_kl

TEACHER = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()


def test_the_value_is_the_teachers_expectation_of_the_gap() -> None:
    value_M, _ = forward_kl(TEACHER, STUDENT)
    # 1/2 log(2) + 1/4 log(1/2) + 1/4 log(1) = 1/4 log 2
    assert value_M.tolist() == pytest.approx([math.log(2) / 4])


def test_the_gradient_is_minus_the_teacher() -> None:
    _, gradient_MC = forward_kl(TEACHER, STUDENT)
    assert gradient_MC.tolist() == [pytest.approx([-0.5, -0.25, -0.25])]


def test_the_written_gradient_is_that_of_the_value() -> None:
    student = STUDENT.clone().requires_grad_()
    value_M, gradient_MC = forward_kl(TEACHER, student)
    (expected,) = torch.autograd.grad(value_M.sum(), student)
    torch.testing.assert_close(gradient_MC, expected)


def test_equal_distributions_have_no_divergence() -> None:
    assert forward_kl(TEACHER, TEACHER)[0].tolist() == [0.0]


def test_a_category_that_the_teacher_never_uses_costs_nothing() -> None:
    """0 * (-inf - x) is 0 here, also where the student has no mass either."""
    teacher = torch.tensor([[0.0, -math.inf, -math.inf]])
    student = torch.tensor([[math.log(0.5), math.log(0.5), -math.inf]])
    value_M, gradient_MC = forward_kl(teacher, student)
    assert value_M.tolist() == pytest.approx([math.log(2)])
    assert gradient_MC.tolist() == [[-1.0, 0.0, 0.0]]


def test_a_category_that_the_student_cannot_say_costs_infinitely_much() -> None:
    student = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=torch.float64)
    assert forward_kl(TEACHER, student)[0].tolist() == [math.inf]


def test_it_prefers_covering_two_modes_to_choosing_one() -> None:
    teacher = torch.tensor([[0.495, 0.495, 0.01]]).log()
    chooses = torch.tensor([[0.98, 0.01, 0.01]]).log()
    covers = torch.tensor([[1 / 3, 1 / 3, 1 / 3]]).log()
    assert forward_kl(teacher, covers)[0] < forward_kl(teacher, chooses)[0]
