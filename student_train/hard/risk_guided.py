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

from student_train.hard.base import HardRest
from student_train.hard.config import RiskGuidedConfig
from student_train.losses.base import TeacherRows
from student_train.losses.linear_head import LinearHead


class RiskGuided:
    """The risk-guided term of a micro-batch in float32 (float64 for float64 inputs).

    The metric ``risk`` is alpha/4 times the squared difference, unweighted.

    Source: Bridge-Garden (ICML 2026), ``chi2`` of the authors' release; inverse soft-Q learning
    with a chi-square regulariser, as in SequenceMatch (Cundy and Ermon, ICLR 2024). Two choices are
    ours: rows of all documents share one normaliser, for which the mean over documents of the
    last term is weighted by their lengths, and a loss that is not finite is an error.
    """

    def __init__(
        self, hidden_MH: Tensor, head: LinearHead, rows: TeacherRows, config: RiskGuidedConfig
    ) -> None:
        assert rows.document_M is not None
        self._config = config
        self._logit_M = label_logits(hidden_MH, head, rows.hard_M)
        self._score_M = score_M = self._logit_M.detach()
        self._has_next_M, self._age_M, length_M = _places(rows.document_M)
        self._discount_M = config.gamma ** self._age_M.to(score_M)
        size = config.alpha * (1 - config.gamma) / 4
        last_M = length_M * config.gamma ** length_M.to(score_M) * size
        # of the last row of a document; what it weighs at every other row is 0
        self._last_M = last_M.masked_fill(self._has_next_M, 0.0)
        self._discounted_M, self._to_value_M = torch.zeros_like(score_M), torch.zeros_like(score_M)

    def cross_entropy_weight(
        self, place: slice, weight_N: Tensor, student_logprob_N: Tensor
    ) -> Tensor:
        """A, the derivative with respect to V; it needs nothing of later rows."""
        score_M, gamma = self._score_M, self._config.gamma
        weight_N = weight_N.to(score_M)
        value_N = score_M[place] - student_logprob_N.to(score_M)  # V: log-sum-exp of the logits
        self._discounted_M[place] = discounted_N = weight_N * self._discount_M[place]
        before_N = (torch.arange(place.start, place.stop, device=score_M.device) - 1).clamp_min(0)
        gap_before_N = score_M[before_N] - gamma * value_N
        from_before_N = self._discounted_M[before_N] * gap_before_N * (self._config.alpha / 2)
        to_value_N = discounted_N + 2 * weight_N * self._last_M[place] * value_N
        to_value_N -= torch.where(self._age_M[place] > 0, gamma * from_before_N, 0.0)
        self._to_value_M[place] = to_value_N
        return to_value_N

    def rest(self, weight_M: Tensor, student_logprob_M: Tensor) -> HardRest:
        """The part of the label's logit, and what makes the value right."""
        alpha, score_M = self._config.alpha, self._score_M
        value_M = score_M - student_logprob_M.to(score_M)
        next_value_M = torch.where(self._has_next_M, value_M.roll(-1), 0.0)
        gap_M = score_M - self._config.gamma * next_value_M
        risk_M = alpha / 4 * gap_M**2
        discounted_M, to_value_M = self._discounted_M, self._to_value_M
        to_logit_M = discounted_M * (1 - alpha / 2 * gap_M)
        linear = ((to_value_M - to_logit_M) * self._logit_M).sum()
        cross_entropy_M = value_M - score_M
        last_M = weight_M.to(score_M) * self._last_M * value_M**2
        wanted = (discounted_M * (cross_entropy_M + risk_M) + last_M).sum()
        counted = (to_value_M * cross_entropy_M).sum() + linear.detach()
        return HardRest(linear + (wanted - counted), {"risk": risk_M})


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
