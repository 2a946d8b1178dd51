"""The hybrid loss: soft and hard terms blended by one weight per token."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from student_train.config import HybridLossConfig, StaticWeightConfig
from student_train.losses.base import LossTerms, TeacherRows
from student_train.losses.hybrid import hybrid_loss
from student_train.losses.reference import reference_loss

V = 20


def labels() -> TeacherRows:
    random = torch.Generator().manual_seed(0)
    logprobs = torch.randn(5, V, generator=random, dtype=torch.float64).log_softmax(dim=-1)
    values, ids = logprobs.sort(dim=-1, descending=True)
    return TeacherRows(ids[:, 2], ids[:, :4], values[:, :4], values[:, 4:].logsumexp(dim=-1))


def leaves() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return (
        torch.randn(5, 3, generator=random, dtype=torch.float64).requires_grad_(),
        torch.randn(V, 3, generator=random, dtype=torch.float64).requires_grad_(),
    )


def hybrid(
    soft_weight: float, soft: Literal["forward_kl", "reverse_kl"] = "forward_kl"
) -> tuple[LossTerms, tuple[Tensor, ...]]:
    hidden, weight = leaves()
    config = HybridLossConfig(soft=soft, weight=StaticWeightConfig(soft_weight=soft_weight))
    terms = hybrid_loss(hidden, weight, labels(), config, vocab_size=V)
    return terms, torch.autograd.grad(terms.total, (hidden, weight))


@pytest.mark.parametrize("soft", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("soft_weight", [0.0, 0.25, 1.0])
def test_value_and_gradients_equal_the_reference(
    soft: Literal["forward_kl", "reverse_kl"], soft_weight: float
) -> None:
    terms, found = hybrid(soft_weight, soft)
    hidden, weight = leaves()
    expected = reference_loss(
        hidden @ weight.t(),
        labels(),
        divergence=soft,
        soft_weight_M=torch.full((5,), soft_weight),
        hard_weight_M=torch.full((5,), 1 - soft_weight),
    )
    torch.testing.assert_close(terms.total.detach(), expected.detach(), rtol=1e-10, atol=0)
    for one, other in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_weight_zero_is_cross_entropy_of_the_hard_labels() -> None:
    terms, _ = hybrid(0.0)
    hidden, weight = leaves()
    expected = torch.nn.functional.cross_entropy(
        hidden @ weight.t(), labels().hard_M, reduction="sum"
    )
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_weight_one_is_the_divergence_and_ignores_the_hard_labels() -> None:
    terms, _ = hybrid(1.0)
    assert terms.total.item() == pytest.approx(terms.soft_M.sum().item(), rel=1e-12)


def test_the_terms_are_reported_without_their_weight() -> None:
    """A report compares students of different weights, so what it shows must not depend on them."""
    one, other = hybrid(0.25)[0], hybrid(0.75)[0]
    assert torch.equal(one.soft_M, other.soft_M)
    assert torch.equal(one.hard_M, other.hard_M)
    assert one.soft_weight_M.tolist() == [0.25] * 5
    expected = 0.25 * one.soft_M.sum() + 0.75 * one.hard_M.sum()
    assert one.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_students_likeliest_token_is_reported() -> None:
    hidden, weight = leaves()
    assert torch.equal(hybrid(0.5)[0].student_argmax_M, (hidden @ weight.t()).argmax(dim=-1))
