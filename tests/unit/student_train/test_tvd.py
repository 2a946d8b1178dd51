"""Total variation distance: value, gradient and bounds."""

import pytest
import torch

from student_train.losses.tvd import tvd

TEACHER = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()


def test_the_value_is_the_mass_that_has_to_move() -> None:
    assert tvd(TEACHER, STUDENT)[0].tolist() == pytest.approx([0.25])


def test_the_gradient_has_the_size_of_the_students_probability() -> None:
    _, gradient_MC = tvd(TEACHER, STUDENT)
    # q / 2 with the sign of q - p
    assert gradient_MC.tolist() == [pytest.approx([-0.125, 0.25, 0.0])]


def test_disjoint_distributions_are_at_distance_one() -> None:
    teacher = torch.tensor([[1.0, 0.0]], dtype=torch.float64).log()
    assert tvd(teacher, teacher.flip(-1))[0].tolist() == [1.0]


def test_it_is_symmetric() -> None:
    assert torch.equal(tvd(TEACHER, STUDENT)[0], tvd(STUDENT, TEACHER)[0])
