"""Adaptive KL by entropies: forward KL where the teacher is the surer one."""

import math

import pytest
import torch
from torch import Tensor

from student_train.losses.adaptive_kl import entropy_adaptive_kl
from student_train.losses.forward_kl import forward_kl
from student_train.losses.reverse_kl import reverse_kl

FLOOR = -30.0


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def value(teacher: Tensor, student: Tensor, sharpness: float) -> float:
    found, _ = entropy_adaptive_kl(
        teacher, student, sharpness=sharpness, through_weights=True, log_floor=FLOOR
    )
    return float(found)


def test_the_weight_is_the_share_of_the_two_sharpnesses() -> None:
    teacher, student = logs(1.0, 0.0), logs(0.5, 0.5)
    # H(p) = 0, H(q) = log 2: w = 1 / (1 + 2 ** -sharpness)
    forward, reverse = math.log(2), math.log(0.5) + 15
    assert value(teacher, student, 1.0) == pytest.approx(2 / 3 * forward + 1 / 3 * reverse)
    assert value(teacher, student, 0.0) == pytest.approx((forward + reverse) / 2)


def test_a_surer_student_is_pulled_by_the_reverse_kl() -> None:
    teacher, student = logs(0.5, 0.5), logs(0.99, 0.01)
    forward = float(forward_kl(teacher, student)[0])
    reverse = float(reverse_kl(teacher, student, log_floor=FLOOR)[0])
    assert value(teacher, student, 100.0) == pytest.approx(reverse)
    assert value(student, teacher, 100.0) == pytest.approx(float(forward_kl(student, teacher)[0]))
    assert forward != pytest.approx(reverse)


def test_the_gradient_can_hold_the_weights_fixed() -> None:
    teacher, student = logs(0.7, 0.2, 0.1), logs(0.3, 0.3, 0.4)
    fixed, through = (
        entropy_adaptive_kl(teacher, student, sharpness=0.5, through_weights=flag, log_floor=FLOOR)
        for flag in (False, True)
    )
    assert torch.equal(fixed[0], through[0])
    entropy_p, entropy_q = (-(x.exp() * x).sum() for x in (teacher, student))
    weight = 1 / (1 + math.exp(-0.5 * float(entropy_q - entropy_p)))
    forward, reverse = forward_kl(teacher, student), reverse_kl(teacher, student, log_floor=FLOOR)
    torch.testing.assert_close(fixed[1], weight * forward[1] + (1 - weight) * reverse[1])
    # dw = w (1 - w) / 2 dH(q), and dH(q) = -q (log q + 1)
    slope = -0.5 * weight * (1 - weight) * student.exp() * (student + 1)
    torch.testing.assert_close(through[1] - fixed[1], (forward[0] - reverse[0]) * slope)
