"""Hard labels first: the soft weight of all tokens follows the optimiser step."""

import torch

from student_train.losses.base import TeacherRows
from student_train.weights.base import TokenWeights, WeightContext
from student_train.weights.config import CurriculumWeightConfig


def curriculum_weight(
    rows: TeacherRows, config: CurriculumWeightConfig, context: WeightContext
) -> TokenWeights:
    r"""A linear ramp over the first ``warmup_ratio`` of N steps, then constant.

    .. math:: w(n) = \lambda \min(n / (\rho N), 1), \qquad
        w_{reverse}(n) = 1 - (1 - \lambda) \min(n / (\rho N), 1)

    n counts finished optimiser steps, so the first step has the weight 0 (reverse: 1).

    Source: Bridge-Garden (ICML 2026), ``curriculum_weight`` and ``reverse_curriculum_weight``.
    """
    ramp_steps = config.warmup_ratio * context.step.total_steps
    done = min(context.step.step / ramp_steps, 1.0) if ramp_steps > 0 else 1.0
    weight = (
        1.0 - (1.0 - config.soft_weight) * done if config.reverse else config.soft_weight * done
    )
    return TokenWeights.blend(torch.full_like(rows.log_tail_mass_M, weight))
