"""Generalised Jensen-Shannon divergence: value, bounds and ends."""

import math

import pytest
import torch

from student_train.losses.forward_kl import forward_kl
from student_train.losses.jsd import jsd
from student_train.losses.reverse_kl import reverse_kl

TEACHER = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()


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


def test_its_ends_are_the_two_kls_divided_by_the_weight() -> None:
    """It goes to 0 there itself, which is why 0 and 1 are not among its weights."""
    teacher = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.3, 0.4]], dtype=torch.float64).log()
    tiny = 1e-7
    forward, reverse = forward_kl(teacher, student), reverse_kl(teacher, student, log_floor=-30.0)
    # to first order in the weight; the second order is 1e-7
    near_0 = jsd(teacher, student, beta=tiny)[0] / tiny
    near_1 = jsd(teacher, student, beta=1 - tiny)[0] / tiny
    assert near_0.tolist() == pytest.approx(forward[0].tolist(), rel=1e-5)
    assert near_1.tolist() == pytest.approx(reverse[0].tolist(), rel=1e-5)
