"""Soft labels where the teacher's likeliest token is weak among those it could say."""

import torch

from storage.tail import LOG_ZERO
from student_train.losses.base import PADDING_ID, TeacherRows
from student_train.weights.base import TokenWeights, WeightContext
from student_train.weights.config import AmbiguityWeightConfig


def ambiguity_weight(
    rows: TeacherRows, config: AmbiguityWeightConfig, context: WeightContext
) -> TokenWeights:
    r"""How far the likeliest token is from certain, relative to a uniform choice.

    .. math:: w = \lambda \, \frac{1 - \max_a p(a)}{1 - 1 / |\mathrm{supp}\, p|}

    A row with one possible token has the weight 0. The support is exact where the stored tokens
    hold all probability, as those of a teacher with few choices do; a row with a tail counts the
    whole vocabulary, as every softmax does.

    Source: Bridge-Garden (ICML 2026), ``hybrid_kd`` of the synthetic study.
    """
    possible_MK = (rows.topk_ids_MK != PADDING_ID) & (rows.topk_logprobs_MK > LOG_ZERO)
    stored_M = possible_MK.sum(dim=-1)
    has_tail_M = rows.log_tail_mass_M > LOG_ZERO
    support_M = torch.where(has_tail_M, context.vocab_size, stored_M)
    top_M = rows.topk_logprobs_MK[:, 0].clamp_max(0.0).exp()
    largest_M = (1.0 - 1.0 / support_M.to(top_M)).clamp_min(torch.finfo(top_M.dtype).tiny)
    ambiguity_M = torch.where(support_M > 1, (1.0 - top_M) / largest_M, 0.0).clamp(0.0, 1.0)
    return TokenWeights.blend(config.soft_weight * ambiguity_M)
