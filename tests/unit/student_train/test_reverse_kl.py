"""Reverse KL on categories: value, gradient and the floor that keeps it finite."""

import math

import pytest
import torch
from torch import Tensor

from student_train.losses.reverse_kl import reverse_kl

FLOOR = -30.0
TEACHER = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()


def compare(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    return reverse_kl(teacher, student, log_floor=FLOOR)


def test_the_value_is_the_students_expectation_of_the_gap() -> None:
    value_M, _ = compare(TEACHER, STUDENT)
    # 1/4 log(1/2) + 1/2 log(2) + 1/4 log(1) = 1/4 log 2
    assert value_M.tolist() == pytest.approx([math.log(2) / 4])


def test_the_written_gradient_is_that_of_the_value() -> None:
    student = STUDENT.clone().requires_grad_()
    value_M, gradient_MC = compare(TEACHER, student)
    (expected,) = torch.autograd.grad(value_M.sum(), student)
    torch.testing.assert_close(gradient_MC, expected)


def test_equal_distributions_have_no_divergence() -> None:
    assert compare(TEACHER, TEACHER)[0].tolist() == [0.0]


def test_mass_where_the_teacher_has_none_costs_the_floor() -> None:
    teacher = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    student = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    value_M, gradient_MC = compare(teacher, student)
    # 1/2 (log 1/2 - 0) + 1/2 (log 1/2 + 30)
    assert value_M.tolist() == pytest.approx([math.log(0.5) - FLOOR / 2])
    assert bool(torch.isfinite(gradient_MC).all())


def test_a_category_that_the_student_never_uses_costs_nothing() -> None:
    """The teacher may say it: that is what makes the divergence seek one mode."""
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    student = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    value_M, gradient_MC = compare(teacher, student)
    assert value_M.tolist() == pytest.approx([math.log(2)])
    assert gradient_MC[0, 1].item() == 0.0


def test_it_prefers_choosing_one_mode_to_covering_both() -> None:
    teacher = torch.tensor([[0.495, 0.495, 0.01]]).log()
    chooses = torch.tensor([[0.98, 0.01, 0.01]]).log()
    covers = torch.tensor([[1 / 3, 1 / 3, 1 / 3]]).log()
    assert compare(teacher, chooses)[0] < compare(teacher, covers)[0]
