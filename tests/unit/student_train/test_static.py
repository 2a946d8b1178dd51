"""The static policy: one soft weight for every token."""

import pytest
import torch
from pydantic import ValidationError

from student_train.config import StaticWeightConfig
from student_train.losses.base import TeacherRows
from student_train.weights.static import static_weight


@pytest.mark.parametrize("soft_weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("num_rows", [0, 3])
def test_every_row_gets_the_configured_weight(soft_weight: float, num_rows: int) -> None:
    ids = torch.zeros(num_rows, 2, dtype=torch.long)
    rows = TeacherRows(ids[:, 0], ids, torch.zeros(num_rows, 2), torch.zeros(num_rows))
    found_M = static_weight(rows, StaticWeightConfig(soft_weight=soft_weight))
    assert found_M.tolist() == [soft_weight] * num_rows
    assert found_M.dtype == torch.float32


@pytest.mark.parametrize("soft_weight", [-0.1, 1.1])
def test_a_weight_outside_zero_and_one_is_refused(soft_weight: float) -> None:
    with pytest.raises(ValidationError, match="soft_weight"):
        StaticWeightConfig(soft_weight=soft_weight)
