"""Adaptive KL by head and tail gaps: what is the head, and how it weighs."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from student_train.losses.adaptive_kl import adaptive_kl
from student_train.losses.forward_kl import forward_kl
from student_train.losses.reverse_kl import reverse_kl

FLOOR = -30.0


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def weight(
    teacher: Tensor,
    student: Tensor,
    head_mass: float = 0.5,
    head: Literal["reach", "within"] = "reach",
) -> float:
    """The weight of the forward KL, from the value."""
    value = adaptive_kl(
        teacher, student, head_mass=head_mass, head=head, through_weights=False, log_floor=FLOOR
    )[0]
    forward = forward_kl(teacher, student)[0]
    reverse = reverse_kl(teacher, student, log_floor=FLOOR)[0]
    return float((value - reverse) / (forward - reverse))


def test_the_weight_is_the_heads_share_of_the_difference() -> None:
    teacher, student = logs(0.6, 0.2, 0.1, 0.1), logs(0.3, 0.2, 0.3, 0.2)
    # head: the first token alone reaches 1/2; gaps 0.3 | 0, 0.2, 0.1
    assert weight(teacher, student) == pytest.approx(0.5)
    # with 0.7 the second token joins, without a gap; with 0.9 the third does, with its 0.2
    assert weight(teacher, student, 0.7) == pytest.approx(0.5)
    assert weight(teacher, student, 0.9) == pytest.approx(5 / 6)


def test_the_token_that_crosses_the_mass_may_be_left_out() -> None:
    teacher, student = logs(0.6, 0.2, 0.1, 0.1), logs(0.3, 0.2, 0.3, 0.2)
    # the likeliest token is head although it has more than 1/2
    assert weight(teacher, student, head="within") == pytest.approx(0.5)
    # 0.6 and 0.2 stay within 0.85; with the stored token of 0.1 it would be more
    assert weight(teacher, student, 0.85, "within") == pytest.approx(0.5)
    # it has to come to reach it
    assert weight(teacher, student, 0.85, "reach") == pytest.approx(5 / 6)


def test_equal_tokens_stay_out_of_the_head_together() -> None:
    teacher, student = logs(0.4, 0.2, 0.2, 0.2), logs(0.3, 0.4, 0.2, 0.1)
    # the first of the two of 0.2 would stay within 0.7, both would not; gaps 0.1 | 0.2, 0, 0.1
    assert weight(teacher, student, 0.7, "within") == pytest.approx(1 / 4)
    assert weight(teacher, student, 0.9, "within") == pytest.approx(3 / 4)


def test_the_head_does_not_depend_on_the_order_of_the_tokens() -> None:
    """Seen elsewhere: the mask of the sorted probabilities applied to unsorted ones."""
    teacher, student = logs(0.1, 0.6, 0.2, 0.1), logs(0.3, 0.3, 0.2, 0.2)
    assert weight(teacher, student) == pytest.approx(0.5)


def test_equal_tokens_are_in_the_head_together() -> None:
    teacher, student = logs(0.3, 0.3, 0.3, 0.1), logs(0.5, 0.2, 0.2, 0.1)
    # before each of the three nothing is likelier: all the difference is in the head
    assert weight(teacher, student) == pytest.approx(1.0)


def test_the_tail_category_is_never_in_the_head() -> None:
    teacher, student = logs(0.1, 0.1, 0.8), logs(0.2, 0.2, 0.6)
    # head: both stored tokens, although they hold 0.2 only; gaps 0.1, 0.1 | 0.2
    assert weight(teacher, student) == pytest.approx(0.5)


def test_the_gradient_holds_the_weights_fixed_unless_told() -> None:
    teacher, student = logs(0.6, 0.2, 0.1, 0.1), logs(0.3, 0.2, 0.3, 0.2)
    fixed, through = (
        adaptive_kl(
            teacher, student, head_mass=0.5, head="reach", through_weights=flag, log_floor=FLOOR
        )
        for flag in (False, True)
    )
    assert torch.equal(fixed[0], through[0])
    forward, reverse = forward_kl(teacher, student), reverse_kl(teacher, student, log_floor=FLOOR)
    torch.testing.assert_close(fixed[1], 0.5 * forward[1] + 0.5 * reverse[1])
    # w = h / (h + t) with h = |p0 - q0| = 0.3 and h + t = 0.6; at the first token
    # dw = (1 - w) (-q0) / 0.6 = -0.25
    expected = float(fixed[1][0, 0]) - 0.25 * float(forward[0] - reverse[0])
    assert float(through[1][0, 0]) == pytest.approx(expected)


def test_equal_distributions_give_zero_and_no_nan() -> None:
    """Their gaps are 0 / 0; seen elsewhere as NaN once a student has converged."""
    teacher = logs(0.6, 0.3, 0.1)
    for flag in (False, True):
        value, gradient = adaptive_kl(
            teacher, teacher, head_mass=0.5, head="reach", through_weights=flag, log_floor=FLOOR
        )
        assert value.tolist() == [0.0]
        # that of forward KL, which the softmax turns into 0
        assert gradient.tolist() == [pytest.approx([-0.6, -0.3, -0.1])]


def test_a_floor_keeps_the_reverse_part_finite() -> None:
    teacher, student = logs(1.0, 0.0), logs(0.5, 0.5)
    value, gradient = adaptive_kl(
        teacher, student, head_mass=0.5, head="reach", through_weights=False, log_floor=FLOOR
    )
    # both gaps are 1/2; forward log 2, reverse log 1/2 + 30 / 2
    assert value.tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * (math.log(0.5) + 15)])
    assert bool(torch.isfinite(gradient).all())
