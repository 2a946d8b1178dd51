"""The hybrid loss: any weight policy with any divergence and any hard term, as by definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from storage.columns import POWERS
from student_train.config import HybridLossConfig, SupervisionConfig, TaidLossConfig
from student_train.hard import HARD_TERMS
from student_train.losses import DIVERGENCES
from student_train.losses.base import LossTerms, TeacherRows, load
from student_train.losses.hybrid import hybrid_loss
from student_train.losses.linear_head import LinearHead
from student_train.losses.reference import reference_loss
from student_train.schedules import StepState
from student_train.weights import WEIGHT_POLICIES
from student_train.weights.base import WeightContext
from student_train.weights.config import StaticWeightConfig

V = 20
EXACT = 1e-10
"""Absolute, float64: sums of a few hundred terms."""
STEP = StepState(step=3, total_steps=10, t=0.6)


def labels() -> TeacherRows:
    """Five rows of two documents with every optional column; the hard label is outside the top-4
    in some."""
    random = torch.Generator().manual_seed(0)
    logprobs = torch.randn(5, V, generator=random, dtype=torch.float64).log_softmax(dim=-1)
    values, ids = logprobs.sort(dim=-1, descending=True)
    places = torch.tensor([0, 2, 5, 1, 9]).unsqueeze(-1)
    return TeacherRows(
        hard_M=ids.gather(-1, places).squeeze(-1),
        topk_ids_MK=ids[:, :4],
        topk_logprobs_MK=values[:, :4],
        log_tail_mass_M=values[:, 4:].logsumexp(dim=-1),
        token_logprob_M=values.gather(-1, places).squeeze(-1),
        entropy_M=-(logprobs.exp() * logprobs).sum(dim=-1),
        log_power_sums={n: (alpha * logprobs).logsumexp(dim=-1) for n, alpha in POWERS.items()},
        sidecar_M=torch.linspace(0, 1, 5, dtype=torch.float64),
        document_M=torch.tensor([0, 0, 0, 1, 1]),
    )


def leaves() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return (
        torch.randn(5, 3, generator=random, dtype=torch.float64).requires_grad_(),
        torch.randn(V, 3, generator=random, dtype=torch.float64).requires_grad_(),
    )


def loss_of(config: SupervisionConfig) -> tuple[LossTerms, tuple[Tensor, ...]]:
    hidden, weight = leaves()
    terms = hybrid_loss(hidden, LinearHead(weight), labels(), config, step=STEP, vocab_size=V)
    return terms, torch.autograd.grad(terms.total, (hidden, weight))


def hybrid(**options: Any) -> tuple[LossTerms, tuple[Tensor, ...]]:
    return loss_of(HybridLossConfig.model_validate(options))


def static(soft_weight: float, **options: Any) -> tuple[LossTerms, tuple[Tensor, ...]]:
    return hybrid(weight=StaticWeightConfig(soft_weight=soft_weight), **options)


def student_logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.t()).log_softmax(dim=-1)


# -- any policy, any divergence -------------------------------------------------------------------
@pytest.mark.parametrize("soft", sorted(DIVERGENCES))
@pytest.mark.parametrize("policy", sorted(WEIGHT_POLICIES))
def test_value_and_gradients_equal_the_reference(soft: str, policy: str) -> None:
    options = {"type": policy, **({"sidecar": "a" * 32} if policy == "sidecar" else {})}
    config = HybridLossConfig.model_validate({"soft": soft, "weight": options})
    terms, found = loss_of(config)
    hidden, weight = leaves()
    rows = labels()
    student_M = student_logprobs(hidden, weight).detach().gather(-1, rows.hard_M.unsqueeze(-1))
    context = WeightContext(V, STEP, rows.token_logprob_M, student_M.squeeze(-1))
    weights = load(WEIGHT_POLICIES[policy])(rows, config.weight, context)  # type: ignore[operator]
    expected = reference_loss(
        hidden @ weight.t(),
        rows,
        divergence=config.soft,
        soft_weight_M=weights.soft_M,
        hard_weight_M=weights.hard_M,
        schedule=STEP.schedule,
    )
    torch.testing.assert_close(terms.total.detach(), expected.detach(), rtol=0, atol=EXACT)
    for one, other in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT)
    assert torch.equal(terms.soft_weight_M, weights.soft_M)
    assert torch.equal(terms.metrics["hard_weight"], weights.hard_M)


def test_weight_zero_is_cross_entropy_of_the_hard_labels() -> None:
    terms, _ = static(0.0)
    hidden, weight = leaves()
    expected = torch.nn.functional.cross_entropy(
        hidden @ weight.t(), labels().hard_M, reduction="sum"
    )
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_weight_one_is_the_divergence_and_ignores_the_hard_labels() -> None:
    terms, _ = static(1.0)
    assert terms.total.item() == pytest.approx(terms.soft_M.sum().item(), rel=1e-12)


def test_with_forward_kl_it_is_cross_entropy_to_one_mixed_target() -> None:
    """The paper's identity: the gradient is that of the target w p + (1 - w) e_y."""
    _, found = static(0.3)
    hidden, weight = leaves()
    rows = labels()
    logprobs = student_logprobs(hidden, weight)
    stored = logprobs.gather(-1, rows.topk_ids_MK)
    in_tail = torch.ones(5, V, dtype=torch.bool).scatter(-1, rows.topk_ids_MK, False)
    tail = logprobs.masked_fill(~in_tail, -torch.inf).logsumexp(dim=-1)
    teacher = rows.categories(torch.float64).exp()
    hard = logprobs.gather(-1, rows.hard_M.unsqueeze(-1)).squeeze(-1)
    soft = (teacher[:, :-1] * stored).sum(dim=-1) + teacher[:, -1] * tail
    mixed = -(0.3 * soft + 0.7 * hard).sum()
    for one, other in zip(found, torch.autograd.grad(mixed, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT)


# -- what is reported -----------------------------------------------------------------------------
def test_the_terms_are_reported_without_their_weight() -> None:
    """A report compares students of different weights, so what it shows must not depend on them."""
    one, other = static(0.25)[0], static(0.75)[0]
    assert torch.equal(one.soft_M, other.soft_M)
    assert torch.equal(one.hard_M, other.hard_M)
    assert one.soft_weight_M.tolist() == [0.25] * 5
    expected = 0.25 * one.soft_M.sum() + 0.75 * one.hard_M.sum()
    assert one.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_students_likeliest_token_is_reported() -> None:
    hidden, weight = leaves()
    assert torch.equal(static(0.5)[0].student_argmax_M, (hidden @ weight.t()).argmax(dim=-1))


@pytest.mark.parametrize("hard_term", sorted(HARD_TERMS))
@pytest.mark.parametrize("student_entropy", [0.0, 0.1])
def test_metrics_are_one_number_per_row(hard_term: str, student_entropy: float) -> None:
    config = HybridLossConfig.model_validate(
        {"hard_term": hard_term, "student_entropy": student_entropy}
    )
    terms, _ = loss_of(config)
    assert all(values.shape == (5,) for values in terms.metrics.values())
    assert not any(values.requires_grad for values in terms.metrics.values())


# -- the student's entropy ------------------------------------------------------------------------
def test_the_students_entropy_is_subtracted() -> None:
    terms, found = static(0.5, student_entropy=0.3)
    plain, without = static(0.5)
    hidden, weight = leaves()
    entropy_M = torch.distributions.Categorical(logits=hidden @ weight.t()).entropy()
    gradients = torch.autograd.grad(entropy_M.sum(), (hidden, weight))
    expected = plain.total - 0.3 * entropy_M.sum()
    torch.testing.assert_close(terms.total.detach(), expected.detach(), rtol=0, atol=EXACT)
    torch.testing.assert_close(
        terms.metrics["student_entropy"], entropy_M.detach(), rtol=0, atol=EXACT
    )
    for one, other, gradient in zip(found, without, gradients, strict=True):
        torch.testing.assert_close(one, other - 0.3 * gradient, rtol=0, atol=EXACT)


# -- hard labels ----------------------------------------------------------------------------------
def test_the_confidence_in_an_argmax_label_is_that_of_the_likeliest_token() -> None:
    weight = {"type": "confidence", "of": "label"}
    found = hybrid(hard="argmax", weight=weight)[0].soft_weight_M
    torch.testing.assert_close(found, hybrid(weight="confidence")[0].soft_weight_M)


# -- TAID -----------------------------------------------------------------------------------------
def test_taid_is_its_divergence_at_the_t_of_the_step_alone() -> None:
    terms, found = loss_of(TaidLossConfig())
    hidden, weight = leaves()
    nothing = torch.zeros(5)
    expected = reference_loss(
        hidden @ weight.t(),
        labels(),
        divergence=TaidLossConfig().soft,
        soft_weight_M=nothing + 1,
        hard_weight_M=nothing,
        schedule={"t": 0.6},
    )
    torch.testing.assert_close(terms.total.detach(), expected.detach(), rtol=0, atol=EXACT)
    for one, other in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT)


def test_taid_and_a_hybrid_with_the_soft_term_taid_are_one() -> None:
    one, other = loss_of(TaidLossConfig())[0], static(1.0, soft="taid")[0]
    assert one.total.item() == other.total.item()
