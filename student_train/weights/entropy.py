"""Soft labels where the teacher's distribution is spread out, hard labels where it is a point."""

import math

import torch
from torch import Tensor

from storage.columns import POWERS
from student_train.losses.base import TeacherRows
from student_train.weights.base import TokenWeights, WeightContext
from student_train.weights.config import EntropyWeightConfig


def entropy_weight(
    rows: TeacherRows, config: EntropyWeightConfig, context: WeightContext
) -> TokenWeights:
    r"""Spread of the teacher's distribution, 0 for a one-hot and 1 for a uniform one.

    .. math:: w = H(p) / \log V \quad\text{or}\quad
        w = \frac{\sum_a p(a)^\gamma - 1}{V^{1 - \gamma} - 1}, \qquad w_{reverse} = 1 - w

    Both are exact: entropy and power sum were taken over the full vocabulary when the label was
    made. Values are cut to [0, 1]: rows of a padded output layer belong to the teacher's sums, not
    to V.

    Source: Bridge-Garden (ICML 2026), entropy weights: the paper has Shannon's entropy, the
    authors' release (``entropy_sft_distill``, reverse ``entropy_sft_sft``) the power sum.
    """
    spread_M = (
        _shannon(rows, config, context)
        if config.measure == "shannon"
        else _power_sum(rows, config, context)
    )
    spread_M = spread_M.clamp(0.0, 1.0)
    return TokenWeights.blend(1.0 - spread_M if config.reverse else spread_M)


def _shannon(rows: TeacherRows, config: EntropyWeightConfig, context: WeightContext) -> Tensor:
    assert rows.entropy_M is not None  # refused when the config is read
    return rows.entropy_M / (config.scale_nats or _log_vocabulary(context))


def _power_sum(rows: TeacherRows, config: EntropyWeightConfig, context: WeightContext) -> Tensor:
    (name,) = (name for name, alpha in POWERS.items() if alpha == config.gamma)
    log_sum_M = rows.log_power_sums[name]
    return torch.expm1(log_sum_M) / math.expm1((1 - config.gamma) * _log_vocabulary(context))


def _log_vocabulary(context: WeightContext) -> float:
    """A vocabulary of one token has no spread to measure: any scale gives the weight 0."""
    return math.log(max(context.vocab_size, 2))
