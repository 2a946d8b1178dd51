"""What is said of student and teacher beside the loss, row by row; nothing here has a gradient.

Shape legend as in ``base.py``. Everything is of temperature 1, whatever the loss is computed at.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from student_train.losses.base import FixedWeights, LossTerms, TeacherRows
from student_train.losses.forward_kl import forward_kl
from student_train.losses.fused_linear import fused_linear_loss
from student_train.losses.linear_head import LinearHead
from student_train.losses.reverse_kl import reverse_kl

STEP_MEASURES = (
    "teacher_topk_mass",
    "student_topk_mass",
    "teacher_tail_mass",
    "student_tail_mass",
    "overlap",
    "teacher_category_entropy",
    "student_category_entropy",
)
"""Names of what :func:`step_measures` always holds."""

LOG_FLOOR = -30.0
"""Teacher log-probs below this count as this in the reverse KL, as in ``loss.soft``."""


def step_measures(rows: TeacherRows, student_MC: Tensor) -> dict[str, Tensor]:
    r"""What every optimiser step reports, float[M] each.

    With p and q teacher and student on the k+1 categories, the tail last: the mass of both on the
    stored tokens and in the tail, the overlap :math:`\sum_c \min(p_c, q_c)`, 1 where they are
    equal, and the entropies of both in nats. An entropy of categories is at most that of the
    vocabulary; ``teacher_entropy``, that of the vocabulary, is there where the labels store it.

    Args:
        rows: Teacher labels.
        student_MC: float[M, C], log-probs of the student.
    """
    teacher_MC = rows.categories(student_MC.dtype)
    teacher, student = teacher_MC.exp(), student_MC.exp()
    measures = {
        "teacher_topk_mass": 1 - teacher[:, -1],
        "student_topk_mass": 1 - student[:, -1],
        "teacher_tail_mass": teacher[:, -1],
        "student_tail_mass": student[:, -1],
        "overlap": torch.minimum(teacher, student).sum(dim=-1),
        "teacher_category_entropy": _entropy(teacher, teacher_MC),
        "student_category_entropy": _entropy(student, student_MC),
    }
    if rows.entropy_M is not None:
        measures["teacher_entropy"] = rows.entropy_M
    return measures


def _entropy(probabilities_MC: Tensor, logprobs_MC: Tensor) -> Tensor:
    terms_MC = torch.where(probabilities_MC > 0, probabilities_MC * logprobs_MC, 0.0)
    return -terms_MC.sum(dim=-1)


HELD_OUT_MEASURES: dict[str, Callable[[LossTerms, TeacherRows], Tensor]] = {
    "kl": lambda terms, rows: terms.soft_M,
    "reverse_kl": lambda terms, rows: _reverse_kl(terms, rows),
    "cross_entropy": lambda terms, rows: terms.hard_M,
    "agreement": lambda terms, rows: terms.student_argmax_M == rows.topk_ids_MK[:, 0],
    "topk_overlap": lambda terms, rows: terms.metrics["topk_overlap"],
    "student_entropy": lambda terms, rows: terms.metrics["student_entropy"],
}
"""Measures of every row by their names, from what :func:`held_out_terms` finds."""


def held_out_terms(
    hidden_MH: Tensor, head: LinearHead, rows: TeacherRows, *, vocab_size: int
) -> LossTerms:
    """Everything that a held-out evaluation measures, in one pass, without a gradient.

    Soft term: KL(teacher, student) on the k+1 categories. ``metrics`` hold the student's entropy
    over the vocabulary, and the share of the stored tokens that are among as many likeliest tokens
    of the student. Arguments: :func:`student_train.losses.fused_linear.fused_linear_loss`.
    """
    one_M = torch.ones_like(rows.log_tail_mass_M)
    with torch.no_grad():
        terms = fused_linear_loss(
            hidden_MH,
            head,
            rows,
            divergence=forward_kl,
            weights=FixedWeights(one_M, torch.zeros_like(one_M)),
            entropy_weight_M=torch.zeros_like(one_M),
            topk_overlap=True,
            vocab_size=vocab_size,
        )
    assert terms.entropy_M is not None
    assert terms.topk_overlap_M is not None
    return LossTerms(
        total=terms.total,
        soft_M=terms.soft_M,
        hard_M=terms.hard_M,
        soft_weight_M=terms.soft_weight_M,
        student_argmax_M=terms.student_argmax_M,
        student_MC=terms.student_MC,
        metrics={"student_entropy": terms.entropy_M, "topk_overlap": terms.topk_overlap_M},
    )


def _reverse_kl(terms: LossTerms, rows: TeacherRows) -> Tensor:
    teacher_MC = rows.categories(terms.student_MC.dtype)
    return reverse_kl(teacher_MC, terms.student_MC, log_floor=LOG_FLOOR)[0]
