"""Forward KL from samples: its mean over the draws is the dense loss, with the dense gradient.

The means are exact sums over all possible draws, so nothing here is random.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from student_train.errors import PreflightError
from student_train.losses.base import NEG_INF, PADDING_ID, TeacherRows
from student_train.losses.config import soft_config
from student_train.losses.reference import reference_soft
from student_train.losses.soft_term import SoftTerm, make_divergence

V, K = 7, 3
EXACT = 1e-12
"""Sums of a dozen float64 terms."""

SAMPLED = soft_config({"type": "forward_kl", "tail": "sampled"})
TERM = make_divergence(SAMPLED)


def teacher() -> Tensor:
    """Log-probs of one teacher, likeliest first."""
    return torch.tensor([0.4, 0.2, 0.15, 0.12, 0.08, 0.04, 0.01], dtype=torch.float64).log()


def student_logits() -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(1, V, generator=random, dtype=torch.float64).requires_grad_()


def rows_with(ids: list[int], weights: list[float], *, cover_all: bool = False) -> TeacherRows:
    log_p = teacher()
    return TeacherRows(
        hard_M=torch.tensor([0]),
        topk_ids_MK=torch.arange(K)[None],
        topk_logprobs_MK=log_p[None, :K],
        log_tail_mass_M=log_p[None, K:].logsumexp(dim=-1),
        entropy_M=-(log_p.exp() * log_p).sum()[None],
        tail_ids_MS=torch.tensor([ids]),
        tail_weights_MS=torch.tensor([weights], dtype=torch.float64),
        samples_cover_all=cover_all,
    )


def fast(logits: Tensor, rows: TeacherRows, term: SoftTerm = TERM) -> tuple[Tensor, Tensor]:
    """Value and gradient of the logits, put together as a kernel does."""
    logprobs = logits.detach().log_softmax(dim=-1)
    stored = logprobs.gather(-1, rows.topk_ids_MK)
    rest = logprobs.scatter(-1, rows.topk_ids_MK, NEG_INF).logsumexp(dim=-1, keepdim=True)
    student = torch.cat([stored, rest], dim=-1)
    value, by_category = term(term.teacher_categories(rows, torch.float64), student)
    assert rows.tail_ids_MS is not None
    ids = rows.tail_ids_MS.clamp_min(0)
    more, by_sample = term.sample_terms(rows, logprobs.gather(-1, ids))
    assert float(by_category[0, -1]) == 0.0  # the tail category takes no part
    gradient = torch.zeros_like(logprobs)
    gradient.scatter_add_(-1, rows.topk_ids_MK, by_category[:, :-1])
    gradient.scatter_add_(-1, ids, by_sample)
    return value + more, gradient - logprobs.exp() * gradient.sum(dim=-1, keepdim=True)


def dense(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = teacher()
    value = (log_p.exp() * (log_p - logits.log_softmax(dim=-1))).sum(dim=-1)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


def draws(kind: str) -> list[tuple[float, TeacherRows]]:
    """Every possible outcome of one draw, and its probability."""
    p = teacher().exp().tolist()
    tail = sum(p[K:])
    if kind == "stratified":
        return [(p[i] / tail, rows_with([i], [tail])) for i in range(K, V)]
    if kind == "counts":
        return [(p[i], rows_with([i], [1.0], cover_all=True)) for i in range(V)]
    # threshold 0.1: token 3 is kept as it is, tokens 4, 5 and 6 with probabilities 0.8, 0.4, 0.1
    # of p / 0.1, and then with the weight 0.1; which of them go together does not matter
    outcomes = [(0.5, [4]), (0.1, [5]), (0.3, [4, 5]), (0.1, [6])]
    return [
        (chance, rows_with([3, *ids, *[PADDING_ID] * (2 - len(ids))], [p[3], 0.1, 0.1]))
        for chance, ids in outcomes
    ]


@pytest.mark.parametrize("kind", ["stratified", "threshold", "counts"])
def test_the_mean_over_the_draws_is_the_dense_forward_kl(kind: str) -> None:
    logits = student_logits()
    value, gradient = torch.zeros(1).double(), torch.zeros(1, V).double()
    for chance, rows in draws(kind):
        one, slope = fast(logits, rows)
        value, gradient = value + chance * one, gradient + chance * slope
    expected, expected_gradient = dense(logits)
    torch.testing.assert_close(value, expected, rtol=0, atol=EXACT)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=EXACT)


@pytest.mark.parametrize("kind", ["stratified", "threshold", "counts"])
@pytest.mark.parametrize("entropy", [True, False])
def test_every_draw_equals_the_reference(kind: str, entropy: bool) -> None:
    logits = student_logits()
    for _, drawn in draws(kind):
        rows = drawn if entropy else replace(drawn, entropy_M=None)
        expected = reference_soft(logits, rows, divergence=SAMPLED)
        value, gradient = fast(logits, rows)
        torch.testing.assert_close(value, expected.detach(), rtol=0, atol=EXACT)
        (slope,) = torch.autograd.grad(expected.sum(), logits)
        torch.testing.assert_close(gradient, slope, rtol=0, atol=EXACT)


def test_without_the_entropy_the_value_is_larger_by_that_of_the_tail() -> None:
    rows, logits = rows_with([4], [0.25]), student_logits()
    with_entropy, gradient = fast(logits, rows)
    without, same = fast(logits, replace(rows, entropy_M=None))
    tail = teacher()[K:]
    difference = -(tail.exp() * tail).sum()
    torch.testing.assert_close(without - with_entropy, difference[None], rtol=0, atol=EXACT)
    assert torch.equal(gradient, same)


def test_unused_and_repeated_samples() -> None:
    """Unused entries change nothing, whatever stands there; weights of one token add up."""
    logits = student_logits()
    plain = fast(logits, rows_with([3, 5], [0.15, 0.1]))
    padded = fast(logits, rows_with([3, 5, PADDING_ID], [0.15, 0.1, 0.7]))
    split = fast(logits, rows_with([3, 5, 3], [0.1, 0.1, 0.05]))
    for one, other, third in zip(plain, padded, split, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=EXACT)
        torch.testing.assert_close(third, one, rtol=0, atol=EXACT)


def test_everything_stored_is_the_dense_loss_without_a_sample() -> None:
    logits, log_p = student_logits(), teacher()
    rows = replace(
        rows_with([PADDING_ID], [0.0]),
        topk_ids_MK=torch.arange(V)[None],
        topk_logprobs_MK=log_p[None],
        log_tail_mass_M=torch.tensor([-math.inf], dtype=torch.float64),
    )
    for found, expected in zip(fast(logits, rows), dense(logits), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)


def test_a_sample_that_the_student_cannot_say_does_not_hurt_where_it_is_unused() -> None:
    rows = rows_with([3, PADDING_ID], [0.25, 0.0])
    value, gradient = TERM.sample_terms(rows, torch.tensor([[-1.0, NEG_INF]]))
    assert bool(torch.isfinite(value).all())
    assert gradient.tolist() == [[-0.25, 0.0]]


def test_missing_samples_are_refused() -> None:
    rows: Any = replace(rows_with([3], [0.25]), tail_ids_MS=None, tail_weights_MS=None)
    with pytest.raises(PreflightError, match="the labels hold none; label with a column of type"):
        TERM.sample_terms(rows, torch.zeros(1, 1))
