"""Hybrid supervision: soft labels and hard labels, weighted token by token."""

from typing import cast

from torch import Tensor

from student_train.config import HybridLossConfig
from student_train.losses import DIVERGENCES
from student_train.losses.base import Divergence, LossTerms, TeacherRows, load
from student_train.losses.fused_linear import fused_linear_loss
from student_train.weights import WEIGHT_POLICIES


def hybrid_loss(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    rows: TeacherRows,
    config: HybridLossConfig,
    *,
    vocab_size: int,
) -> LossTerms:
    r"""Blend a divergence on soft labels with cross-entropy on hard labels.

    .. math:: L = \sum_m w_m D(p_m, q_m) + (1 - w_m) (-\log q_m[y_m])

    ``w`` near 0 treats a position as a *bridge* (commit to the exact token), near 1 as a *garden*
    (match the distribution). ``w = 0`` is cross-entropy alone, ``w = 1`` the divergence alone.

    Args:
        hidden_MH: float[M, H], hidden states of the supervised positions.
        weight_VH: float[V, H], output embedding.
        rows: Teacher labels of the same positions; ``hard_M`` already holds the chosen hard label.
        config: Divergence and weight policy.
        vocab_size: Effective vocabulary of the labels.

    Returns:
        Sums in nats; see :class:`LossTerms`. The trainer divides by the global token count.

    Source:
        The Bridge-Garden Dilemma in LLM Distillation (ICML 2026), hybrid objective. Differs from
        the authors' release: both terms share one normaliser, and the hard label is chosen by
        ``config.hard`` instead of being always the teacher's argmax.
    """
    policy = load(WEIGHT_POLICIES[config.weight.type])
    soft_weight_M = cast(Tensor, policy(rows, config.weight))  # type: ignore[operator]
    terms = fused_linear_loss(
        hidden_MH,
        weight_VH,
        rows,
        divergence=cast(Divergence, load(DIVERGENCES[config.soft])),
        soft_weight_M=soft_weight_M,
        hard_weight_M=1.0 - soft_weight_M,
        vocab_size=vocab_size,
    )
    return LossTerms(
        total=terms.total,
        soft_M=terms.soft_M,
        hard_M=terms.hard_M,
        soft_weight_M=soft_weight_M,
        student_argmax_M=terms.student_argmax_M,
    )
