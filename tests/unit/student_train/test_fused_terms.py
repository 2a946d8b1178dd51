"""What the fused pass does besides a divergence and a hard label at temperature 1."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from student_train.losses import head_chunks
from student_train.losses.base import PADDING_ID, TeacherRows
from student_train.losses.config import soft_config
from student_train.losses.fused_linear import fused_linear_loss
from student_train.losses.linear_head import LinearHead
from student_train.losses.soft_term import make_divergence
from tests.unit.student_train.fused_rows import (
    V,
    assert_close,
    assert_same_loss,
    expected_loss,
    fused,
    gradients,
    make_leaves,
    make_rows,
    make_weights,
    only_soft,
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows per product, two per sweep."""
    monkeypatch.setattr(head_chunks, "CHUNK_ROWS", 3)
    monkeypatch.setattr(head_chunks, "BLOCK_BYTES", 2 * V * 8)


def nothing(num_rows: int) -> tuple[Tensor, Tensor]:
    return (torch.zeros(num_rows, dtype=torch.float64),) * 2


# -- hard labels alone -----------------------------------------------------------------------------
def test_without_a_soft_term_it_is_cross_entropy() -> None:
    rows, (hidden, weight) = make_rows(7, 5), make_leaves(7)
    terms = fused(hidden, weight, rows, None, weights=only_soft(7)[::-1])
    logits = hidden @ weight.t()
    expected = torch.nn.functional.cross_entropy(logits, rows.hard_M, reduction="sum")
    assert_same_loss(terms.total, expected, hidden, weight)
    assert torch.equal(terms.soft_M, torch.zeros(7, dtype=torch.float64))
    assert torch.equal(terms.student_argmax_M, logits.argmax(dim=-1))


# -- temperature -----------------------------------------------------------------------------------
def with_power_sums(rows: TeacherRows, logits_MV: Tensor) -> TeacherRows:
    """log sum p ** 0.5, by its definition."""
    logprobs_MV = logits_MV.log_softmax(dim=-1)
    return replace(rows, log_power_sums={"50": (0.5 * logprobs_MV).logsumexp(dim=-1)})


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "taid"])
def test_a_temperature_softens_the_soft_term_only(divergence: str, squared: bool) -> None:
    """All tokens stored: the teacher at temperature 2 is a softmax of halved log-probs."""
    rows, (hidden, weight) = make_rows(7, V), make_leaves(7)
    rows = with_power_sums(rows, rows.topk_logprobs_MK)
    config = soft_config({"type": divergence, "temperature": 2.0, "temperature_squared": squared})
    found = fused(hidden, weight, rows, config)
    assert_same_loss(found.total, expected_loss(hidden @ weight.t(), rows, config), hidden, weight)
    hard_M = torch.nn.functional.cross_entropy(hidden @ weight.t(), rows.hard_M, reduction="none")
    assert_close(found.hard_M, hard_M.detach())


@pytest.mark.parametrize("tail", ["bucket", "renorm", "zero"])
@pytest.mark.parametrize("k", [1, 5])
def test_a_tail_at_another_temperature_has_another_shape(tail: str, k: int) -> None:
    random = torch.Generator().manual_seed(5)
    logits_MV = 2 * torch.randn(7, V, generator=random, dtype=torch.float64)
    top, ids = logits_MV.log_softmax(dim=-1).sort(dim=-1, descending=True)
    rows = TeacherRows(ids[:, 2], ids[:, :k], top[:, :k], top[:, k:].logsumexp(dim=-1))
    rows = with_power_sums(rows, logits_MV)
    hidden, weight = make_leaves(7)
    config = soft_config({"type": "forward_kl", "temperature": 2.0, "tail": tail})
    assert_same_loss(
        fused(hidden, weight, rows, config).total,
        expected_loss(hidden @ weight.t(), rows, config),
        hidden,
        weight,
    )
    assert torch.autograd.gradcheck(lambda h, w: fused(h, w, rows, config).total, (hidden, weight))


# -- the student's entropy -------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_negative_entropy_of_the_student_is_added(k: int, scale: float) -> None:
    """At scale 30 most probabilities are 0 in float64."""
    rows, (hidden, weight) = make_rows(7, k), make_leaves(7, scale=scale)
    entropy_weight_M = torch.linspace(0, 2, 7, dtype=torch.float64)
    found = fused(hidden, weight, rows, weights=nothing(7), entropy_weight_M=entropy_weight_M)
    logprobs = (hidden @ weight.t()).log_softmax(dim=-1)
    entropy_M = -(logprobs.exp() * logprobs).sum(dim=-1)
    assert found.entropy_M is not None
    assert_close(found.entropy_M, entropy_M.detach())
    assert_same_loss(found.total, -(entropy_weight_M * entropy_M).sum(), hidden, weight)


def test_the_entropy_of_huge_logits_does_not_cancel() -> None:
    """q is 1/2, 1/2 and nothing: log q from logits of 1e6 would be wrong in float32."""
    hidden = torch.ones(1, 1)
    weight = torch.tensor([[1e6], [1e6], [-1e6], [0.0]]).requires_grad_()
    rows = make_rows(1, 1, vocab_size=4)
    for stored in range(4):
        rows = replace(rows, topk_ids_MK=torch.tensor([[stored]]))
        terms = fused(
            hidden, weight, rows, weights=nothing(1), entropy_weight_M=torch.ones(1), vocab_size=4
        )
        assert terms.entropy_M is not None
        assert terms.entropy_M.tolist() == pytest.approx([math.log(2)], rel=1e-6)
        assert gradients(terms.total, weight)[0].abs().max() < 1e-6


def test_soft_hard_and_entropy_terms_add_up() -> None:
    rows, (hidden, weight) = make_rows(7, 5), make_leaves(7)
    entropy_weight_M = torch.full((7,), 0.3, dtype=torch.float64)
    together = fused(hidden, weight, rows, entropy_weight_M=entropy_weight_M).total
    apart = (
        fused(hidden, weight, rows).total
        + fused(hidden, weight, rows, weights=nothing(7), entropy_weight_M=entropy_weight_M).total
    )
    assert_same_loss(together, apart, hidden, weight)


def test_everything_at_once_passes_gradcheck() -> None:
    rows, (hidden, weight) = make_rows(4, V - 3), make_leaves(4)
    rows = with_power_sums(rows, torch.randn(4, V, dtype=torch.float64))
    config = soft_config({"type": "jsd", "temperature": 2.0, "temperature_squared": True})
    bias = torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_()
    entropy_weight_M = torch.linspace(0, 1, 4, dtype=torch.float64)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = LinearHead(weight, bias, softcap=4.0, scale=0.7)
        return fused(hidden, head, rows, config, entropy_weight_M=entropy_weight_M).total

    assert torch.autograd.gradcheck(total, (hidden, weight, bias))


# -- samples of the teacher's tail -----------------------------------------------------------------
SAMPLED = soft_config({"type": "forward_kl", "tail": "sampled"})


def with_samples(rows: TeacherRows, num_samples: int, *, seed: int) -> TeacherRows:
    """Draws from the tail by its own probabilities, which are uniform; the last one is unused."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.full((len(rows), num_samples + 1), PADDING_ID)
    for row in range(len(rows)):
        stored = set(rows.topk_ids_MK[row].tolist())
        tail = torch.tensor([token for token in range(V) if token not in stored])
        ids[row, :-1] = tail[torch.randint(len(tail), (num_samples,), generator=random)]
    weights = (rows.log_tail_mass_M.exp() / num_samples).unsqueeze(-1).expand(-1, num_samples)
    return replace(rows, tail_ids_MS=ids, tail_weights_MS=torch.nn.functional.pad(weights, (0, 1)))


def uniform_tail(num_rows: int, k: int) -> tuple[TeacherRows, Tensor]:
    """Labels, and the full distribution: half the mass stored, half spread evenly."""
    rows = make_rows(num_rows, k)
    stored = (rows.topk_logprobs_MK.log_softmax(dim=-1).exp() / 2).log()
    full = torch.full((num_rows, V), math.log(0.5 / (V - k)), dtype=torch.float64)
    tail_M = torch.full((num_rows,), math.log(0.5), dtype=torch.float64)
    return (
        replace(rows, topk_logprobs_MK=stored, log_tail_mass_M=tail_M),
        full.scatter(-1, rows.topk_ids_MK, stored),
    )


def test_sampled_tokens_get_their_weight_in_value_and_gradient() -> None:
    """Samples repeat, one is padding, and a hard label may be among them."""
    rows, _ = uniform_tail(7, 4)
    rows = with_samples(rows, 6, seed=0)
    assert rows.tail_ids_MS is not None
    rows = replace(rows, hard_M=torch.where(torch.arange(7) % 2 == 0, rows.tail_ids_MS[:, 0], 3))
    hidden, weight = make_leaves(7)
    assert_same_loss(
        fused(hidden, weight, rows, SAMPLED).total,
        expected_loss(hidden @ weight.t(), rows, SAMPLED),
        hidden,
        weight,
    )
    assert torch.autograd.gradcheck(lambda h, w: fused(h, w, rows, SAMPLED).total, (hidden, weight))


def test_the_mean_over_draws_of_the_tail_is_the_dense_gradient() -> None:
    rows, full = uniform_tail(3, 4)
    hidden, weight = make_leaves(3)
    logprobs = (hidden @ weight.t()).log_softmax(dim=-1)
    (dense,) = gradients(-(full.exp() * logprobs).sum(), weight)
    draws = [
        gradients(
            fused(
                hidden, weight, with_samples(rows, 4, seed=seed), SAMPLED, weights=only_soft(3)
            ).total,
            weight,
        )[0]
        for seed in range(400)
    ]
    stacked = torch.stack(draws)
    # four standard errors of the mean, entry by entry; fixed seeds
    allowed = 4 * stacked.std(dim=0) / math.sqrt(len(draws)) + 1e-9
    assert bool(((stacked.mean(dim=0) - dense).abs() <= allowed).all())
    (bucket,) = gradients(fused(hidden, weight, rows, weights=only_soft(3)).total, weight)
    assert bool(((bucket - dense).abs() > allowed).any())


# -- weights --------------------------------------------------------------------------------------
def test_weights_may_depend_on_the_student() -> None:
    """They are asked for block by block, in order, and no gradient flows through them."""
    rows, (hidden, weight) = make_rows(7, 5), make_leaves(7)
    places = []

    def weigh(part: TeacherRows, place: slice, student_logprob_N: Tensor) -> tuple[Tensor, Tensor]:
        places.append((place.start, place.stop))
        assert torch.equal(part.hard_M, rows.hard_M[place])
        return student_logprob_N.exp(), -student_logprob_N

    found = fused_linear_loss(
        hidden,
        LinearHead(weight),
        rows,
        divergence=make_divergence(soft_config("forward_kl")),
        weights=weigh,
        vocab_size=V,
    )
    assert places == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]
    logprobs = (hidden @ weight.t()).log_softmax(dim=-1).detach()
    student_M = logprobs.gather(-1, rows.hard_M.unsqueeze(-1)).squeeze(-1)
    assert_close(found.soft_weight_M, student_M.exp())
    assert_close(found.hard_weight_M, -student_M)
    expected = fused(hidden, weight, rows, weights=(student_M.exp(), -student_M)).total
    assert_same_loss(found.total, expected, hidden, weight)


def test_weights_of_a_hybrid_are_those_of_the_terms() -> None:
    rows, (hidden, weight) = make_rows(5, 4), make_leaves(5)
    soft_M, hard_M = make_weights(5)
    terms = fused(hidden, weight, rows)
    assert_close(terms.total.detach(), (soft_M * terms.soft_M + hard_M * terms.hard_M).sum())
