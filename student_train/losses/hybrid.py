"""Hybrid supervision: soft labels and hard labels, weighted token by token."""

from typing import cast

import torch
from torch import Tensor

from student_train.config import SupervisionConfig
from student_train.hard import HARD_TERMS
from student_train.hard.base import HardTermFunction
from student_train.losses.base import LossTerms, TeacherRows, load
from student_train.losses.fused_linear import fused_linear_loss, row_statistics
from student_train.losses.linear_head import LinearHead
from student_train.losses.soft_term import make_divergence
from student_train.schedules import StepState
from student_train.weights import WEIGHT_POLICIES
from student_train.weights.base import WeightContext, WeightPolicy


def hybrid_loss(
    hidden_MH: Tensor,
    head: LinearHead,
    rows: TeacherRows,
    config: SupervisionConfig,
    *,
    step: StepState,
    vocab_size: int,
) -> LossTerms:
    r"""Blend a divergence on soft labels with a term on hard labels.

    .. math:: L = \sum_m w_m D(p_m, q_m) + (1 - w_m) (-\log q_m[y_m]) - \eta H(q_m)

    ``w`` near 0 treats a position as a *bridge* (commit to the exact token), near 1 as a *garden*
    (match the distribution). ``w = 0`` is cross-entropy alone, ``w = 1`` the divergence alone. w,
    D, the hard term and eta (the student's entropy, off by default) are options.

    Args:
        hidden_MH: float[M, H], hidden states of the supervised positions.
        head: Output embedding and what follows it.
        rows: Teacher labels of the same positions; ``hard_M`` already holds the chosen hard label.
        config: Divergence, weight policy and hard term.
        step: Where the training stands, for weights and divergences that move.
        vocab_size: Effective vocabulary of the labels.

    Returns:
        Sums in nats; see :class:`LossTerms`. The trainer divides by the global token count.

    Source:
        The Bridge-Garden Dilemma in LLM Distillation (ICML 2026), hybrid objective. Differs from
        the authors' release: all terms share one normaliser, and the hard label is chosen by
        ``config.hard``.
    """
    student_logprob_M = None
    if config.weight.needs_student or config.hard_term.needs_student:
        found = row_statistics(hidden_MH, head, rows, vocab_size=vocab_size)
        student_logprob_M = found.hard_logprob_M
    policy = cast(WeightPolicy, load(WEIGHT_POLICIES[config.weight.type]))
    context = WeightContext(vocab_size, step, _teacher_logprob(rows, config), student_logprob_M)
    weights = policy(rows, config.weight, context)
    hard_function = cast(HardTermFunction, load(HARD_TERMS[config.hard_term.type]))
    hard = hard_function(
        hidden_MH,
        head,
        rows,
        config.hard_term,
        weight_M=weights.hard_M,
        student_logprob_M=student_logprob_M,
    )
    eta = config.student_entropy
    terms = fused_linear_loss(
        hidden_MH,
        head,
        rows,
        divergence=make_divergence(config.soft, schedule=step.schedule),
        soft_weight_M=weights.soft_M,
        hard_weight_M=hard.cross_entropy_weight_M,
        entropy_weight_M=torch.full_like(weights.soft_M, eta) if eta > 0 else None,
        vocab_size=vocab_size,
    )
    metrics = {"hard_weight": weights.hard_M, **hard.metrics}
    if terms.entropy_M is not None:
        metrics["student_entropy"] = terms.entropy_M
    return LossTerms(
        total=terms.total if hard.rest is None else terms.total + hard.rest,
        soft_M=terms.soft_M,
        hard_M=terms.hard_M,
        soft_weight_M=weights.soft_M,
        student_argmax_M=terms.student_argmax_M,
        metrics=metrics,
    )


def _teacher_logprob(rows: TeacherRows, config: SupervisionConfig) -> Tensor | None:
    """The teacher's log-prob of the hard label, float[M]; None where the cache has none."""
    if config.hard == "argmax":
        return rows.topk_logprobs_MK[:, 0]
    return None if config.hard == "random" else rows.token_logprob_M
