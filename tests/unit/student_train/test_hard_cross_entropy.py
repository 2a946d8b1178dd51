"""The plain hard term leaves everything to the fused pass."""

import torch

from student_train.hard.config import CrossEntropyConfig
from student_train.hard.cross_entropy import CrossEntropy
from student_train.losses.linear_head import LinearHead
from tests.unit.student_train.weight_rows import random_teachers, rows_of


def test_cross_entropy_keeps_its_weights_and_adds_nothing() -> None:
    rows = rows_of(random_teachers(3))
    weight_M, logprob_M = torch.tensor([0.0, 0.5, 1.0]), torch.full((3,), -1.0)
    term = CrossEntropy(
        torch.zeros(3, 2), LinearHead(torch.zeros(30, 2)), rows, CrossEntropyConfig()
    )
    assert term.cross_entropy_weight(slice(0, 3), weight_M, logprob_M) is weight_M
    rest = term.rest(weight_M, logprob_M)
    assert rest.total is None
    assert rest.metrics == {}
