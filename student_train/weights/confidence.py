"""Soft labels where the teacher is unsure, hard labels where it is confident."""

from student_train.losses.base import TeacherRows
from student_train.weights.base import TokenWeights, WeightContext
from student_train.weights.config import ConfidenceWeightConfig


def confidence_weight(
    rows: TeacherRows, config: ConfidenceWeightConfig, context: WeightContext
) -> TokenWeights:
    r"""One minus the teacher's probability of its likeliest token, or of the hard label.

    .. math:: w = 1 - \max_a p(a) \quad\text{or}\quad w = 1 - p(y), \qquad w_{reverse} = 1 - w

    Source: Bridge-Garden (ICML 2026), confidence weights: the paper has the maximum, the authors'
    release (``adap_sft``, ``reverse_adap_sft``) the hard label.
    """
    if config.of == "max":
        logprob_M = rows.topk_logprobs_MK[:, 0]  # likeliest first
    else:
        assert context.teacher_logprob_M is not None  # refused when the config is read
        logprob_M = context.teacher_logprob_M
    # stored log-probs are rounded, and a rounded zero must not become a probability above one
    probability_M = logprob_M.clamp_max(0.0).exp()
    return TokenWeights.blend(probability_M if config.reverse else 1.0 - probability_M)
