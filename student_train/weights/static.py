"""The same soft weight for every token (static hybrid, Bridge-Garden, ICML 2026)."""

import torch
from torch import Tensor

from student_train.config import StaticWeightConfig
from student_train.losses.base import TeacherRows


def static_weight(rows: TeacherRows, config: StaticWeightConfig) -> Tensor:
    """Soft weight of every row, float32[M]; the hard weight is one minus it."""
    return torch.full_like(rows.log_tail_mass_M, config.soft_weight)
