"""The fused loss at the ends of the scale: one-hot teachers, tiny tails, huge logits, bad rows."""

import math

import pytest
import torch

from student_train.errors import NonFiniteLossError
from student_train.losses import DIVERGENCES
from tests.unit.student_train.fused_rows import (
    assert_close,
    from_logits,
    fused,
    gradients,
    make_leaves,
    make_rows,
    one_row,
    only_soft,
)

EVERY = pytest.mark.parametrize("divergence", DIVERGENCES)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("logprobs", "log_tail"),
    [
        ([0.0], -math.inf),  # one-hot
        ([0.0, -math.inf], -math.inf),
        ([math.log(0.75), math.log(0.25)], -math.inf),  # no tail
        ([math.log(1 - 1e-10)], math.log(1e-10)),
        ([0.0], -100.0),  # the stored form of no tail
    ],
)
def test_extreme_teachers_give_finite_losses_and_gradients(
    divergence: str, dtype: torch.dtype, logprobs: list[float], log_tail: float
) -> None:
    hidden, weight = from_logits([0.3, -0.2, 1.0, 0.0], dtype)
    rows = one_row(logprobs, log_tail)
    terms = fused(hidden, weight, rows, divergence, weights=only_soft(1), vocab_size=4)
    (gradient,) = gradients(terms.total, weight)
    assert bool(torch.isfinite(terms.soft_M).all())
    assert bool(torch.isfinite(gradient).all())
    assert float(terms.soft_M) > 0


def test_forward_kl_to_a_one_hot_teacher_is_cross_entropy() -> None:
    hidden, weight = from_logits([0.3, -0.2, 1.0, 0.0])
    rows = one_row([0.0], -math.inf)
    terms = fused(hidden, weight, rows, weights=only_soft(1), vocab_size=4)
    hard = fused(hidden, weight, rows, weights=only_soft(1)[::-1], vocab_size=4)
    assert_close(terms.soft_M, hard.hard_M)
    for one, other in zip(
        gradients(terms.total, weight), gradients(hard.total, weight), strict=True
    ):
        assert_close(one, other)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_give_finite_losses_and_gradients(
    divergence: str, dtype: torch.dtype, size: float
) -> None:
    hidden, weight = from_logits([size, -size, 0.0, size], dtype)
    rows = one_row([math.log(0.5), math.log(0.25)], math.log(0.25), hard=1)
    terms = fused(hidden, weight, rows, divergence, vocab_size=4)
    assert bool(torch.isfinite(terms.total))
    assert bool(torch.isfinite(gradients(terms.total, weight)[0]).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_small_tail_of_the_student_is_summed_and_not_subtracted(dtype: torch.dtype) -> None:
    """s = 2 e^-23 / (1 + 2 e^-23) is 2e-10: one minus the rest is 0 in float32."""
    hidden, weight = from_logits([0.0, -23.0, -23.0], dtype)
    rows = one_row([math.log(0.5)], math.log(0.5))
    terms = fused(hidden, weight, rows, weights=only_soft(1), vocab_size=3)
    log_q = -math.log1p(2 * math.exp(-23))
    log_s = math.log(2) - 23 + log_q
    expected = 0.5 * (math.log(0.5) - log_q) + 0.5 * (math.log(0.5) - log_s)
    assert float(terms.soft_M) == pytest.approx(expected, rel=1e-6)
    (gradient,) = gradients(terms.total, weight)
    # dL/dz_j = q_j (1 - r / s) in the tail; q_j / s is one half, so about -r / 2
    assert gradient[1:, 0].tolist() == pytest.approx([-0.25, -0.25], rel=1e-6)


@pytest.mark.parametrize("hard", [0, 2])
def test_a_hard_label_inside_and_outside_the_top_k_is_plain_cross_entropy(hard: int) -> None:
    """Tokens 0 and 1 are stored; token 2 is in the tail."""
    hidden, weight = from_logits([0.3, -0.2, 1.0, 0.0])
    rows = one_row([math.log(0.5), math.log(0.25)], math.log(0.25), hard=hard)
    weights = (torch.zeros(1).double(), torch.ones(1).double())
    terms = fused(hidden, weight, rows, weights=weights, vocab_size=4)
    expected = torch.nn.functional.cross_entropy(weight.t(), torch.tensor([hard]))
    assert_close(terms.hard_M[0], expected.detach())
    for one, other in zip(gradients(terms.total, weight), gradients(expected, weight), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_rows(bad: float) -> None:
    rows, (hidden, weight) = make_rows(5, 4), make_leaves(5)
    with torch.no_grad():
        hidden[1], hidden[4] = bad, bad
    with pytest.raises(NonFiniteLossError, match=r"loss of rows \[1, 4\] of 5 is not finite"):
        fused(hidden, weight, rows)


def test_a_row_that_is_not_finite_is_found_although_its_weight_is_zero() -> None:
    rows, (hidden, weight) = make_rows(2, 4), make_leaves(2)
    with torch.no_grad():
        hidden[0] = math.nan
    zeros = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(NonFiniteLossError, match=r"rows \[0\]"):
        fused(hidden, weight, rows, weights=(zeros, zeros))


def test_many_bad_rows_are_named_by_the_first_eight() -> None:
    rows, (hidden, weight) = make_rows(20, 4), make_leaves(20)
    with torch.no_grad():
        hidden.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match=r"rows \[0, 1, 2, 3, 4, 5, 6, 7\] of 20"):
        fused(hidden, weight, rows)
