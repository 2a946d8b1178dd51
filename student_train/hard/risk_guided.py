r"""Cross-entropy with a look at the next token: the risk-guided term of Bridge-Garden.

Logits f are read as a soft Q function of (prefix, token), their log-sum-exp V as the value of the
prefix. Choosing y then claims that f(y) is the discounted value of where it leads,
:math:`\gamma V'`, and the square of the difference is added to cross-entropy::

    L = sum_t w_t gamma^t (CE_t + alpha/4 (f_t(y_t) - gamma V_{t+1})^2)
        + sum over documents of  w T gamma^T alpha (1 - gamma)/4 V_{T-1}^2

with t from 0 and T rows in the document, and V = 0 after its last row. The next row of a document
is its next *labelled* position; no difference reaches into another document.

**One pass.** With D_t the difference, the derivatives are linear in V and f(y)::

    dL/dV_t    = A_t = w_t gamma^t - w_{t-1} gamma^{t-1} alpha/2 gamma D_{t-1}  (+ last row)
    dL/df_t(y) = -B_t = -w_t gamma^t (1 - alpha/2 D_t)

and since V_t - f_t(y_t) is the cross-entropy, ``A_t CE_t + (A_t - B_t) f_t(y_t)`` with fixed A and
B has this gradient. The first part is a weight of the fused pass; the second touches one row of the
output embedding per position. So the term costs one product without gradient, for V, and no logits
are kept.

Unlike every other term this one is not invariant to adding a constant to all logits of a row: it
holds their absolute scale.
"""

import torch
from torch import Tensor

from student_train.hard.base import HardTerm
from student_train.hard.config import RiskGuidedConfig
from student_train.losses.base import TeacherRows
from student_train.losses.linear_head import LinearHead


def risk_guided(
    hidden_MH: Tensor,
    head: LinearHead,
    rows: TeacherRows,
    config: RiskGuidedConfig,
    *,
    weight_M: Tensor,
    student_logprob_M: Tensor | None,
) -> HardTerm:
    """The risk-guided term in float32 (float64 for float64 inputs).

    The metric ``risk`` is alpha/4 times the squared difference, unweighted.

    Source: Bridge-Garden (ICML 2026), ``chi2`` of the authors' release; inverse soft-Q learning
    with a chi-square regulariser, as in SequenceMatch (Cundy and Ermon, ICLR 2024). Two choices are
    ours: rows of all documents share one normaliser, for which the mean over documents of the
    last term is weighted by their lengths, and a loss that is not finite is an error.
    """
    assert rows.document_M is not None
    assert student_logprob_M is not None
    if len(rows) == 0:
        return HardTerm(weight_M, metrics={"risk": weight_M})
    logit_M = label_logits(hidden_MH, head, rows.hard_M)
    score_M = logit_M.detach()
    value_M = score_M - student_logprob_M.to(score_M)  # V: log-sum-exp of the logits
    has_next_M, age_M, length_M = _places(rows.document_M)
    next_value_M = torch.where(has_next_M, value_M.roll(-1), 0.0)
    gap_M = score_M - config.gamma * next_value_M

    weight_M = weight_M.to(score_M)
    discounted_M = weight_M * config.gamma ** age_M.to(score_M)
    risk_M = config.alpha / 4 * gap_M**2
    # of the last row of a document; what it weighs at every other row is 0
    last_M = (
        weight_M
        * length_M
        * (config.gamma ** length_M.to(score_M) * config.alpha * (1 - config.gamma) / 4)
    ).masked_fill(has_next_M, 0.0)

    to_value_M = discounted_M + 2 * last_M * value_M
    from_previous_M = (discounted_M * gap_M).roll(1) * (config.alpha / 2 * config.gamma)
    to_value_M = to_value_M - torch.where(age_M > 0, from_previous_M, 0.0)
    to_logit_M = discounted_M * (1 - config.alpha / 2 * gap_M)

    linear = ((to_value_M - to_logit_M) * logit_M).sum()
    cross_entropy_M = value_M - score_M
    wanted = (discounted_M * (cross_entropy_M + risk_M) + last_M * value_M**2).sum()
    counted = (to_value_M * cross_entropy_M).sum() + linear.detach()
    return HardTerm(to_value_M, linear + (wanted - counted), {"risk": risk_M})


def label_logits(hidden_MH: Tensor, head: LinearHead, hard_M: Tensor) -> Tensor:
    """Logit of the hard label of every row, float[M], with gradient; float32 at least."""
    dtype = torch.float64 if hidden_MH.dtype == torch.float64 else torch.float32
    weight_MH = head.weight_VH.index_select(0, hard_M).to(dtype)
    logit_M = (hidden_MH.to(dtype) * weight_MH).sum(dim=-1)
    if head.bias_V is not None:
        logit_M = logit_M + head.bias_V.index_select(0, hard_M).to(dtype)
    logit_M = head.scale * logit_M
    if head.softcap is not None:
        logit_M = head.softcap * torch.tanh(logit_M / head.softcap)
    return logit_M


def _places(document_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where rows stand in their documents.

    Returns:
        bool[M], whether the next row belongs to the same document; int64[M], rows before this one
        in it; int64[M], rows of it.
    """
    starts_M = torch.ones_like(document_M, dtype=torch.bool)
    starts_M[1:] = document_M[1:] != document_M[:-1]
    number_M = starts_M.cumsum(dim=0) - 1
    length_D = torch.bincount(number_M)
    end_D = length_D.cumsum(dim=0)
    index_M = torch.arange(len(document_M), device=document_M.device)
    length_M = length_D[number_M]
    has_next_M = index_M + 1 < end_D[number_M]
    return has_next_M, index_M - (end_D[number_M] - length_M), length_M
