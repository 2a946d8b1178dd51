"""Between the two sweeps over a block of logits: the terms of every row, and their gradient.

A kernel reduces each row of logits to a few numbers (:class:`RowReductions`), this module turns
them into loss terms and into the numbers from which the kernel writes the gradient
(:class:`RowGradient`). Nothing here has the size of the vocabulary, so a divergence is written
once, for every kernel.

Shape legend: N rows of a block, K stored tokens, C = K + 1 categories, S sampled tokens. Notation
as in ``docs/losses.md``: z logits, q = softmax(z), s the student's tail mass, g the derivative with
respect to the categories' log-probs, G its sum, T the temperature of the soft term.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.losses.base import NEG_INF, PADDING_ID, TeacherRows
from student_train.losses.soft_term import SoftTerm


@dataclass(frozen=True, slots=True)
class RowReductions:
    """What one sweep finds in every row. The tail is every token that is not stored."""

    stored_NK: Tensor
    """float[N, K]: logits of the stored tokens, -inf where unused."""
    hard_N1: Tensor
    """float[N, 1]: logit of the hard label."""
    sampled_NS: Tensor | None
    """float[N, S]: logits of the sampled tokens; anything finite where unused."""
    tail_max_N1: Tensor
    """float[N, 1]: largest logit of the tail, -inf where there is no tail."""
    tail_argmax_N1: Tensor
    """int64[N, 1]: the token that has it."""
    tail_log_sum_N1: Tensor
    """float[N, 1]: log of the sum over the tail of exp(z - max z), 0 where there is none. Apart
    from the maximum, because their sum would lose what is behind the decimal point."""
    soft_tail_log_sum_N1: Tensor
    """float[N, 1]: the same of z / T."""
    tail_gap_N1: Tensor | None
    """float[N, 1]: mean of z - max(z) over the tail under the student's own probabilities."""
    tail_best_NK: Tensor | None
    """float[N, K]: largest logits of the tail, descending; -inf where it has fewer."""


@dataclass(frozen=True, slots=True)
class RowGradient:
    r"""The derivative of a row's loss with respect to its logits, in a few numbers.

    With P the softmax over the tail alone at temperature 1 and Q the one at temperature T:

    .. math:: dL/dz_j = P_j (tail + gap \, (z_j - \max z)) + Q_j \, soft\_tail
        \quad \text{in the tail}

    and ``stored`` at the stored tokens; ``hard`` and ``sampled`` come on top at their tokens.
    """

    tail_N1: Tensor
    gap_N1: Tensor | None
    soft_tail_N1: Tensor | None
    stored_NK: Tensor
    hard_N1: Tensor
    sampled_NS: Tensor | None


@dataclass(frozen=True, slots=True)
class RowWeights:
    """Weights of the terms of every row."""

    soft_N1: Tensor
    hard_N1: Tensor
    entropy_N1: Tensor | None
    """On sum q log q, the negative entropy of the student."""


@dataclass(frozen=True, slots=True)
class RowTerms:
    """Unweighted terms of every row, nats."""

    soft_N: Tensor
    hard_N: Tensor
    entropy_N: Tensor | None
    """The student's entropy."""
    argmax_N: Tensor
    """int64[N]: the student's likeliest token."""
    student_NC: Tensor
    """float[N, C]: the student's log-probs of the categories at temperature 1."""
    overlap_N: Tensor | None
    """Share of the stored tokens that are among as many likeliest ones of the student; unit 1."""


@dataclass(frozen=True, slots=True)
class StudentRows:
    """Log-probs of the student at a temperature, from the reductions."""

    temperature: float
    top_N1: Tensor
    """float[N, 1]: largest logit of the row."""
    lse_N1: Tensor
    """float[N, 1]: log of the sum over all tokens of exp((z - top) / T)."""
    student_NC: Tensor
    """float[N, C]: log-probs of the categories."""

    @classmethod
    def of(cls, found: RowReductions, temperature: float = 1.0) -> "StudentRows":
        """Normalise the reductions; ``temperature`` is 1 or the one they were made for."""
        soft_sum_N1, sum_N1 = found.soft_tail_log_sum_N1, found.tail_log_sum_N1
        log_sum_N1 = sum_N1 if temperature == 1.0 else soft_sum_N1
        tops_NC = torch.cat([found.stored_NK, found.tail_max_N1], dim=-1)
        top_N1 = tops_NC.amax(dim=-1, keepdim=True)
        both_NC = (tops_NC - top_N1) / temperature
        both_NC[:, -1:] += log_sum_N1
        lse_N1 = both_NC.logsumexp(dim=-1, keepdim=True)
        return cls(temperature, top_N1, lse_N1, both_NC - lse_N1)

    def logprobs(self, logits_NP: Tensor) -> Tensor:
        """Log-probs of some tokens from their logits, [N, P]."""
        return (logits_NP - self.top_N1) / self.temperature - self.lse_N1

    def negative_entropy(self, found: RowReductions) -> tuple[Tensor, Tensor]:
        """Sum of q log q over the vocabulary, [N, 1], and the tail's largest log-prob, [N, 1].

        The latter is 0 where there is no tail.
        """
        assert found.tail_gap_N1 is not None
        q_NC = self.student_NC.exp()
        has_tail_N1 = found.tail_max_N1 > NEG_INF
        top_N1 = torch.where(has_tail_N1, self.logprobs(found.tail_max_N1), 0.0)
        stored_NK = torch.where(q_NC > 0, q_NC * self.student_NC, 0.0)[:, :-1]
        tail_N1 = torch.where(has_tail_N1, q_NC[:, -1:] * (found.tail_gap_N1 + top_N1), 0.0)
        return stored_NK.sum(dim=-1, keepdim=True) + tail_N1, top_N1


def argmax(found: RowReductions, rows: TeacherRows) -> Tensor:
    """The student's likeliest token of every row, int64[N]."""
    tops_NC = torch.cat([found.stored_NK, found.tail_max_N1], dim=-1)
    ids_NC = torch.cat([rows.topk_ids_MK, found.tail_argmax_N1], dim=-1)
    return ids_NC.gather(-1, tops_NC.argmax(dim=-1, keepdim=True)).squeeze(-1)


def topk_overlap(found: RowReductions, rows: TeacherRows) -> Tensor:
    """Share of each row's stored tokens that are among as many likeliest of the student, [N]."""
    assert found.tail_best_NK is not None
    used_NK = rows.topk_ids_MK != PADDING_ID
    number_N1 = used_NK.sum(dim=-1, keepdim=True).clamp_min(1)
    ordered = torch.cat([found.stored_NK, found.tail_best_NK], dim=-1).sort(dim=-1, descending=True)
    least_N1 = ordered.values.gather(-1, number_N1 - 1)
    among_NK = used_NK & (found.stored_NK >= least_N1)
    return among_NK.sum(dim=-1) / number_N1.squeeze(-1)


def row_terms(
    found: RowReductions,
    rows: TeacherRows,
    teacher_NC: Tensor | None,
    soft: SoftTerm | None,
    weigh: Callable[[Tensor], RowWeights],
) -> tuple[RowTerms, RowGradient]:
    """Terms of every row, and the gradient of their weighted sum.

    Args:
        found: Reductions of the student's logits.
        rows: Teacher labels of the same rows.
        teacher_NC: Categories of the teacher, as ``soft`` wants them.
        soft: Soft term; None for hard labels alone, then the soft terms are 0.
        weigh: Weights of the terms, given the student's log-probs of the hard labels, float[N, 1].
    """
    student = StudentRows.of(found)
    hard_N1 = -student.logprobs(found.hard_N1)
    weights = weigh(-hard_N1)
    unused_NK = rows.topk_ids_MK == PADDING_ID
    q_NC = student.student_NC.exp()
    # cross-entropy: q everywhere, minus one at the hard label
    grad_NC = weights.hard_N1 * q_NC
    soft_tail_N1 = gap_N1 = sampled_NS = negative_N1 = None
    soft_N = torch.zeros_like(hard_N1).squeeze(-1)
    if soft is not None:
        assert teacher_NC is not None
        soft_N, soft_grad_NC, sampled_NS = _soft_gradient(found, student, rows, teacher_NC, soft)
        weight_N1 = weights.soft_N1 / soft.temperature
        soft_grad_NC = weight_N1 * soft_grad_NC
        if sampled_NS is not None:
            sampled_NS = weight_N1 * sampled_NS
        if soft.temperature == 1.0:
            grad_NC = grad_NC + soft_grad_NC
        else:
            # the tail has another shape at another temperature, and a softmax of its own
            soft_tail_N1 = soft_grad_NC[:, -1:].contiguous()
            grad_NC = torch.cat([grad_NC[:, :-1] + soft_grad_NC[:, :-1], grad_NC[:, -1:]], dim=-1)
    if weights.entropy_N1 is not None:
        negative_N1, top_N1 = student.negative_entropy(found)
        # d/dz_j of sum q log q is q_j (log q_j - sum q log q)
        inner_NC = torch.cat([student.student_NC[:, :-1], top_N1], dim=-1) - negative_N1
        grad_NC = grad_NC + torch.where(q_NC > 0, weights.entropy_N1 * q_NC * inner_NC, 0.0)
        gap_N1 = weights.entropy_N1 * q_NC[:, -1:]
    gradient = RowGradient(
        tail_N1=grad_NC[:, -1:],
        gap_N1=gap_N1,
        soft_tail_N1=soft_tail_N1,
        stored_NK=grad_NC[:, :-1].masked_fill(unused_NK, 0.0),
        hard_N1=-weights.hard_N1,
        sampled_NS=sampled_NS,
    )
    entropy_N = None if negative_N1 is None else -negative_N1.squeeze(-1)
    terms = RowTerms(
        soft_N=soft_N,
        hard_N=hard_N1.squeeze(-1),
        entropy_N=entropy_N,
        argmax_N=argmax(found, rows),
        student_NC=student.student_NC,
        overlap_N=None if found.tail_best_NK is None else topk_overlap(found, rows),
    )
    return terms, gradient


def _soft_gradient(
    found: RowReductions,
    student: StudentRows,
    rows: TeacherRows,
    teacher_NC: Tensor,
    soft: SoftTerm,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Value, derivative with respect to z / T summed into categories, and that at the samples.

    The derivative of a stored token is g_j - q_j G, that of the whole tail g_tail - s G; inside
    the tail it is spread like the student's own probabilities.
    """
    if soft.temperature != 1.0:
        student = StudentRows.of(found, soft.temperature)
    soft_N, g_NC = soft(teacher_NC, student.student_NC)
    g_sum_N1 = g_NC.sum(dim=-1, keepdim=True)
    g_sampled_NS = None
    if soft.sampled:
        assert found.sampled_NS is not None
        value_N, g_sampled_NS = soft.sample_terms(rows, student.logprobs(found.sampled_NS))
        soft_N = soft_N + value_N
        g_sum_N1 = g_sum_N1 + g_sampled_NS.sum(dim=-1, keepdim=True)
    return soft_N, g_NC - student.student_NC.exp() * g_sum_N1, g_sampled_NS
