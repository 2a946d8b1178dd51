"""Skew reverse KL: value, gradient, and why it needs no floor."""

import math

import pytest
import torch

from student_train.losses.reverse_kl import reverse_kl
from student_train.losses.skew_kl import skew_reverse_kl

TEACHER = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()


def test_the_value_is_the_kl_from_the_student_to_the_mixture() -> None:
    value_M, _ = skew_reverse_kl(TEACHER, STUDENT, skew=0.1)
    # the mixture is 1/2, 9/20, 1/20: 1/2 log(1) + 1/2 log(10)
    assert value_M.tolist() == pytest.approx([math.log(10) / 2])


def test_the_gradient() -> None:
    _, gradient_MC = skew_reverse_kl(TEACHER, STUDENT, skew=0.1)
    # q (log(q / m) + 1 - 0.1 q / m): 1/2 (0 + 1 - 0.1), 0, 1/2 (log 10 + 1 - 1)
    assert gradient_MC.tolist() == [pytest.approx([0.45, 0.0, math.log(10) / 2])]


def test_what_the_teacher_would_not_say_costs_at_most_the_log_of_the_skew() -> None:
    teacher = torch.tensor([[1.0, 0.0]], dtype=torch.float64).log()
    student = torch.tensor([[0.0, 1.0]], dtype=torch.float64).log()
    assert skew_reverse_kl(teacher, student, skew=0.1)[0].tolist() == pytest.approx([math.log(10)])


def test_with_little_skew_it_is_reverse_kl() -> None:
    teacher = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64).log()
    found = skew_reverse_kl(teacher, student, skew=1e-9)
    expected = reverse_kl(teacher, student, log_floor=-30.0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
