"""The risk-guided term against its formula, written out position by position on dense logits."""

import pytest
import torch
from torch import Tensor

from student_train.config import HybridLossConfig
from student_train.hard.config import RiskGuidedConfig
from student_train.losses.base import LossTerms, TeacherRows
from student_train.losses.hybrid import hybrid_loss
from student_train.losses.linear_head import LinearHead
from student_train.losses.reference import reference_soft
from student_train.schedules import StepState
from student_train.weights.config import ConfidenceWeightConfig, StaticWeightConfig, WeightConfig

V, H = 20, 6
EXACT = 1e-10
"""Relative to the largest entry, float64."""

DOCUMENTS = (4, 1, 3)
"""Rows of the documents of a batch."""


def rows(lengths: tuple[int, ...] = DOCUMENTS) -> TeacherRows:
    num_rows = sum(lengths)
    random = torch.Generator().manual_seed(0)
    logprobs = torch.randn(num_rows, V, generator=random, dtype=torch.float64).log_softmax(dim=-1)
    values, ids = logprobs.sort(dim=-1, descending=True)
    return TeacherRows(
        hard_M=ids[:, 2],
        topk_ids_MK=ids[:, :4],
        topk_logprobs_MK=values[:, :4],
        log_tail_mass_M=values[:, 4:].logsumexp(dim=-1),
        token_logprob_M=values[:, 2],
        document_M=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
    )


def leaves(num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = ((num_rows, H), (V + 3, H), (V + 3,))
    hidden, weight, bias = (
        2 * torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes
    )
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def published(
    logits_MV: Tensor, labels: TeacherRows, hard_weight_M: Tensor, alpha: float, gamma: float
) -> Tensor:
    """The term, position by position, with plain autograd."""
    assert labels.document_M is not None
    total = logits_MV.new_zeros(())
    for document in labels.document_M.unique().tolist():
        where = (labels.document_M == document).nonzero().flatten().tolist()
        value = [logits_MV[row].logsumexp(dim=-1) for row in where]
        score = [logits_MV[row, labels.hard_M[row]] for row in where]
        for t, row in enumerate(where):
            after = value[t + 1] if t + 1 < len(where) else 0.0
            difference = score[t] - gamma * after
            cross_entropy = value[t] - score[t]
            term = cross_entropy + alpha / 4 * difference**2
            total = total + hard_weight_M[row] * gamma**t * term
        length = len(where)
        last = gamma**length * alpha * (1 - gamma) / 4 * value[-1] ** 2
        total = total + hard_weight_M[where[-1]] * length * last
    return total


def guided(
    inputs: tuple[Tensor, Tensor, Tensor],
    labels: TeacherRows,
    config: RiskGuidedConfig,
    weight: WeightConfig,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> LossTerms:
    hidden, embedding, bias = inputs
    return hybrid_loss(
        hidden,
        LinearHead(embedding, bias, softcap, scale),
        labels,
        HybridLossConfig(weight=weight, hard_term=config),
        step=StepState(0, 1),
        vocab_size=V,
    )


def assert_close(found: Tensor, expected: Tensor) -> None:
    atol = EXACT * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("alpha", "gamma"), [(0.05, 0.9999), (0.5, 0.9), (2.0, 0.5), (0.1, 1.0)], ids=str
)
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 0.5)], ids=str)
def test_value_and_gradients_are_those_of_the_formula(
    alpha: float, gamma: float, softcap: float | None, scale: float
) -> None:
    """The confidence weight gives every row a hard weight of its own."""
    labels, weight = rows(), ConfidenceWeightConfig(of="label")
    assert labels.token_logprob_M is not None
    inputs = leaves(len(labels))
    config = RiskGuidedConfig(alpha=alpha, gamma=gamma)
    terms = guided(inputs, labels, config, weight, softcap=softcap, scale=scale)
    found = torch.autograd.grad(terms.total, inputs)

    hidden, embedding, bias = inputs
    logits = scale * (hidden @ embedding.t() + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hard_M = labels.token_logprob_M.exp()
    logits = logits[:, :V]
    soft = soft_term(logits, labels, 1 - hard_M)
    expected = soft + published(logits, labels, hard_M, alpha, gamma)
    assert_close(terms.total, expected)
    for one, other in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        assert_close(one, other)


def soft_term(logits_MV: Tensor, labels: TeacherRows, soft_weight_M: Tensor) -> Tensor:
    return (soft_weight_M * reference_soft(logits_MV, labels, divergence="forward_kl")).sum()


def test_the_gradient_is_the_derivative_of_the_value() -> None:
    labels = rows((2, 3))
    config = RiskGuidedConfig(alpha=1.0, gamma=0.8)
    weight = StaticWeightConfig(soft_weight=0.25)

    def total(*inputs: Tensor) -> Tensor:
        return guided(inputs, labels, config, weight).total  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(total, leaves(5))


def test_documents_do_not_look_into_each_other() -> None:
    """A batch is the sum of its documents, whatever stands beside them."""
    labels, config = rows(), RiskGuidedConfig(alpha=1.0, gamma=0.9)
    hidden, embedding, bias = leaves(len(labels))
    weight = StaticWeightConfig(soft_weight=0.5)
    together = guided((hidden, embedding, bias), labels, config, weight)
    start, parts = 0, []
    for length in DOCUMENTS:
        stop = start + length
        inputs = (hidden[start:stop], embedding, bias)
        parts.append(guided(inputs, labels.rows(start, stop), config, weight))
        start = stop
    assert_close(together.total, torch.stack([part.total for part in parts]).sum())
    assert_close(together.metrics["risk"], torch.cat([part.metrics["risk"] for part in parts]))


def test_no_weight_on_the_hard_term_is_no_risk() -> None:
    labels = rows()
    inputs = leaves(len(labels))
    weight = StaticWeightConfig(soft_weight=1.0)
    terms = guided(inputs, labels, RiskGuidedConfig(), weight)
    assert_close(terms.total, terms.soft_M.sum())


def test_without_rows_there_is_nothing_to_add() -> None:
    labels = rows().rows(0, 0)
    terms = guided(leaves(0), labels, RiskGuidedConfig(), StaticWeightConfig())
    assert terms.total.item() == 0.0
    assert terms.metrics["risk"].shape == (0,)


def test_the_cross_entropy_is_reported_without_the_risk() -> None:
    labels = rows()
    inputs = leaves(len(labels))
    terms = guided(inputs, labels, RiskGuidedConfig(alpha=2.0), StaticWeightConfig())
    logits = (inputs[0] @ inputs[1].t() + inputs[2])[:, :V]
    expected = torch.nn.functional.cross_entropy(logits, labels.hard_M, reduction="none")
    assert_close(terms.hard_M, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_follow(dtype: torch.dtype) -> None:
    """The term itself is float32: what differs is the rounding of the inputs and of gradients."""
    labels = rows()
    config, weight = RiskGuidedConfig(alpha=0.5), StaticWeightConfig()
    exact = leaves(len(labels))
    rounded: tuple[Tensor, ...] = tuple(t.detach().to(dtype).requires_grad_() for t in exact)
    same = tuple(t.detach().double().requires_grad_() for t in rounded)
    low, high = (guided(t, labels, config, weight) for t in (rounded, same))  # type: ignore[arg-type]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(low.total.double(), high.total, rtol=tolerance, atol=0)
    for one, other in zip(
        torch.autograd.grad(low.total, rounded), torch.autograd.grad(high.total, same), strict=True
    ):
        limit = tolerance * float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=limit)


def test_the_published_defaults() -> None:
    assert RiskGuidedConfig() == RiskGuidedConfig(alpha=0.05, gamma=0.9999)
