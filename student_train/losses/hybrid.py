"""Hybrid supervision: soft labels and hard labels, weighted token by token."""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from student_train.config import SupervisionConfig
from student_train.hard import HARD_TERMS
from student_train.hard.base import HardTerm, HardTermFunction
from student_train.losses.base import LossTerms, TeacherRows, load
from student_train.losses.fused_linear import fused_linear_loss
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
    make_hard_term = cast(HardTermFunction, load(HARD_TERMS[config.hard_term.type]))
    hard_term = make_hard_term(hidden_MH, head, rows, config.hard_term)
    weights = _HybridWeights(rows, config, hard_term, step=step, vocab_size=vocab_size)
    eta = config.student_entropy
    terms = fused_linear_loss(
        hidden_MH,
        head,
        rows,
        divergence=make_divergence(config.soft, schedule=step.schedule),
        weights=weights,
        entropy_weight_M=torch.full_like(rows.log_tail_mass_M, eta) if eta > 0 else None,
        vocab_size=vocab_size,
    )
    rest = hard_term.rest(weights.hard_M, -terms.hard_M)
    metrics = {"hard_weight": weights.hard_M, **rest.metrics}
    if terms.entropy_M is not None:
        metrics["student_entropy"] = terms.entropy_M
    return LossTerms(
        total=terms.total if rest.total is None else terms.total + rest.total,
        soft_M=terms.soft_M,
        hard_M=terms.hard_M,
        soft_weight_M=terms.soft_weight_M,
        student_argmax_M=terms.student_argmax_M,
        student_MC=terms.student_MC,
        metrics=metrics,
    )


class _HybridWeights:
    """What a weight policy and a hard term make of every row, as the fused pass comes to it."""

    def __init__(
        self,
        rows: TeacherRows,
        config: SupervisionConfig,
        hard_term: HardTerm,
        *,
        step: StepState,
        vocab_size: int,
    ) -> None:
        self._config = config
        self._policy = cast(WeightPolicy, load(WEIGHT_POLICIES[config.weight.type]))
        self._hard_term = hard_term
        self._context = WeightContext(vocab_size, step)
        self.hard_M = torch.empty_like(rows.log_tail_mass_M)
        """float[M]: weight of the hard term of every row that the pass has come to."""

    def __call__(
        self, rows: TeacherRows, place: slice, student_logprob_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        context = replace(
            self._context,
            teacher_logprob_M=_teacher_logprob(rows, self._config),
            student_logprob_M=student_logprob_N,
        )
        weights = self._policy(rows, self._config.weight, context)
        self.hard_M[place] = weights.hard_M
        return weights.soft_M, self._hard_term.cross_entropy_weight(
            place, weights.hard_M, student_logprob_N
        )


def _teacher_logprob(rows: TeacherRows, config: SupervisionConfig) -> Tensor | None:
    """The teacher's log-prob of the hard label, float[M]; None where the cache has none."""
    if config.hard == "argmax":
        return rows.topk_logprobs_MK[:, 0]
    return None if config.hard == "random" else rows.token_logprob_M
