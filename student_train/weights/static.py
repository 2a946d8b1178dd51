"""The same soft weight for every token."""

import torch

from student_train.losses.base import TeacherRows
from student_train.weights.base import TokenWeights, WeightContext
from student_train.weights.config import StaticWeightConfig


def static_weight(
    rows: TeacherRows, config: StaticWeightConfig, context: WeightContext
) -> TokenWeights:
    """``soft_weight`` for every row.

    Source: Bridge-Garden (ICML 2026), static hybrid.
    """
    return TokenWeights.blend(torch.full_like(rows.log_tail_mass_M, config.soft_weight))
