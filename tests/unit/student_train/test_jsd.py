"""Generalised Jensen-Shannon divergence: value, bounds and ends."""

import math

import pytest
import torch
from torch import Tensor

from student_train.losses.forward_kl import forward_kl
from student_train.losses.jsd import jsd as jsd_with_floor
from student_train.losses.reverse_kl import reverse_kl

TEACHER = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()

FLOOR = -30.0


def jsd(teacher: Tensor, student: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    return jsd_with_floor(teacher, student, beta=beta, log_floor=FLOOR)


def test_the_value_is_the_mean_kl_to_the_mixture() -> None:
    value_M, _ = jsd(TEACHER, STUDENT, beta=0.5)
    # the mixture is 1/2, 1/4, 1/4: each side has 1/2 log(1) + 1/2 log 2
    assert value_M.tolist() == pytest.approx([math.log(2) / 2])


def test_the_gradient_is_the_students_part() -> None:
    _, gradient_MC = jsd(TEACHER, STUDENT, beta=0.5)
    # (1 - beta) q log(q / m): nothing where q = m or q = 0, 1/4 log 2 where m is half of q
    assert gradient_MC.tolist() == [pytest.approx([0.0, 0.0, math.log(2) / 4])]


def test_disjoint_distributions_cost_at_most_the_entropy_of_the_weights() -> None:
    teacher = torch.tensor([[1.0, 0.0]], dtype=torch.float64).log()
    student = torch.tensor([[0.0, 1.0]], dtype=torch.float64).log()
    for beta in (0.1, 0.5, 0.9):
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert jsd(teacher, student, beta=beta)[0].tolist() == pytest.approx([entropy])


def test_exchanging_both_sides_and_the_weight_changes_nothing() -> None:
    one = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    other = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64).log()
    torch.testing.assert_close(jsd(one, other, beta=0.2)[0], jsd(other, one, beta=0.8)[0])


def test_it_goes_to_its_ends_like_the_weight() -> None:
    teacher = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64).log()
    tiny = 1e-7
    # to first order in the weight; the second order is 1e-7
    for beta, end in ((tiny, 0.0), (1 - tiny, 1.0)):
        near, there = jsd(teacher, student, beta=beta), jsd(teacher, student, beta=end)
        assert (near[0] / tiny).tolist() == pytest.approx(there[0].tolist(), rel=1e-5)
        # the student's softmax takes away what is the same for all categories
        slopes = [g - student.exp() * g.sum() for g in (near[1] / tiny, there[1])]
        torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-8)


def test_its_ends_are_the_two_kls() -> None:
    """As in TRL, where beta 0 is forward and beta 1 reverse KL."""
    for beta, expected in (
        (0.0, forward_kl(TEACHER, STUDENT)),
        (1.0, reverse_kl(TEACHER, STUDENT, log_floor=FLOOR)),
    ):
        for one, other in zip(jsd(TEACHER, STUDENT, beta=beta), expected, strict=True):
            assert torch.equal(one, other)
