"""The plain hard term leaves everything to the fused pass."""

import torch

from student_train.hard.config import CrossEntropyConfig
from student_train.hard.cross_entropy import cross_entropy
from student_train.losses.linear_head import LinearHead
from tests.unit.student_train.weight_rows import random_teachers, rows_of


def test_cross_entropy_keeps_its_weights_and_adds_nothing() -> None:
    rows = rows_of(random_teachers(3))
    weight_M = torch.tensor([0.0, 0.5, 1.0])
    hidden_MH, head = torch.zeros(3, 2), LinearHead(torch.zeros(30, 2))
    found = cross_entropy(
        hidden_MH, head, rows, CrossEntropyConfig(), weight_M=weight_M, student_logprob_M=None
    )
    assert found.cross_entropy_weight_M is weight_M
    assert found.rest is None
    assert found.metrics == {}
