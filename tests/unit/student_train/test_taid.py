"""TAID at one interpolation parameter: the target, its ends, and the value that is published."""

import math

import pytest
import torch
from torch import Tensor

from student_train.losses.forward_kl import forward_kl
from student_train.losses.taid import taid

FLOOR = -30.0
TEACHER = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64).log()


def logit_gradient(student: Tensor, gradient: Tensor) -> Tensor:
    return gradient - student.exp() * gradient.sum(dim=-1, keepdim=True)


def test_the_target_is_the_softmax_of_interpolated_logits() -> None:
    """As published, on raw logits: what a row's logits share drops out."""
    t = 0.4
    logits = (1 - t) * (STUDENT + 3.0) + t * (TEACHER - 5.0)
    _, gradient = taid(TEACHER, STUDENT, t=t, value="cross_entropy", log_floor=FLOOR)
    torch.testing.assert_close(-gradient, logits.softmax(dim=-1))


def test_the_published_value_is_the_cross_entropy() -> None:
    target = ((STUDENT + TEACHER) / 2).softmax(dim=-1)
    found, _ = taid(TEACHER, STUDENT, t=0.5, value="cross_entropy", log_floor=FLOOR)
    torch.testing.assert_close(found, -(target * STUDENT).sum(dim=-1))
    without, _ = taid(TEACHER, STUDENT, t=0.5, value="kl", log_floor=FLOOR)
    torch.testing.assert_close(without, (target * (target.log() - STUDENT)).sum(dim=-1))


def test_at_the_start_the_target_is_the_student_and_nothing_moves() -> None:
    value, gradient = taid(TEACHER, STUDENT, t=0.0, value="kl", log_floor=FLOOR)
    torch.testing.assert_close(value, torch.zeros(1).double())
    torch.testing.assert_close(logit_gradient(STUDENT, gradient), torch.zeros(1, 3).double())


def test_at_the_end_it_is_forward_kl() -> None:
    found = taid(TEACHER, STUDENT, t=1.0, value="kl", log_floor=FLOOR)
    for one, other in zip(found, forward_kl(TEACHER, STUDENT), strict=True):
        torch.testing.assert_close(one, other)


def test_at_the_end_a_student_without_mass_leaves_no_nan() -> None:
    """(1 - t) * -inf is no number at t = 1."""
    student = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=torch.float64)
    value, gradient = taid(TEACHER, student, t=1.0, value="cross_entropy", log_floor=FLOOR)
    assert value.tolist() == [0.0]
    assert gradient.tolist() == [[-1.0, 0.0, 0.0]]


def test_a_token_that_the_teacher_never_says_stays_in_the_target_at_small_t() -> None:
    """Without a floor it would leave at once: the student would sharpen itself from step one."""
    teacher = torch.tensor([[1.0, 0.0]], dtype=torch.float64).log()
    student = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    _, gradient = taid(teacher, student, t=0.01, value="kl", log_floor=FLOOR)
    # exp(0.01 * -30) = 0.74 of its share is left: 0.74 / 1.74
    left = math.exp(-0.3) / (1 + math.exp(-0.3))
    assert float(-gradient[0, 1]) == pytest.approx(left)
