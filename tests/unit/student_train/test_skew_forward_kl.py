"""Skew forward KL: value, gradient, and why it is bounded."""

import math

import pytest
import torch

from student_train.losses.forward_kl import forward_kl
from student_train.losses.skew_kl import skew_forward_kl

TEACHER = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()


def test_the_value_is_the_kl_to_the_mixture() -> None:
    value_M, _ = skew_forward_kl(TEACHER, STUDENT, skew=0.1)
    # the mixture is 1/2, 1/20, 9/20: 1/2 log(1) + 1/2 log(10)
    assert value_M.tolist() == pytest.approx([math.log(10) / 2])


def test_the_gradient_is_the_students_share_of_the_mixture() -> None:
    _, gradient_MC = skew_forward_kl(TEACHER, STUDENT, skew=0.1)
    # -0.9 p q / m: at the first token -0.9 * 1/4 / 1/2; elsewhere p or q is 0
    assert gradient_MC.tolist() == [pytest.approx([-0.45, 0.0, 0.0])]


def test_what_the_student_cannot_say_costs_at_most_the_log_of_the_skew() -> None:
    teacher = torch.tensor([[1.0, 0.0]], dtype=torch.float64).log()
    student = torch.tensor([[0.0, 1.0]], dtype=torch.float64).log()
    value_M, gradient_MC = skew_forward_kl(teacher, student, skew=0.1)
    assert value_M.tolist() == pytest.approx([math.log(10)])
    assert gradient_MC.tolist() == [[0.0, 0.0]]


def test_without_skew_it_is_forward_kl() -> None:
    teacher = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64).log()
    for one, other in zip(
        skew_forward_kl(teacher, student, skew=0.0), forward_kl(teacher, student), strict=True
    ):
        torch.testing.assert_close(one, other)
