"""The fast loss equals the obvious one, in value and in gradient, whatever the shapes."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from student_train.errors import NonFiniteLossError
from student_train.losses import DIVERGENCES, fused_linear
from student_train.losses.base import PADDING_ID, Divergence, TeacherRows, load
from student_train.losses.fused_linear import FusedTerms, fused_linear_loss
from student_train.losses.reference import reference_loss

H = 6
V = 29

TOLERANCE = {
    # sums of a few hundred terms, each rounded to 2**-53
    torch.float64: 1e-10,
    # 2**-24 per operation; the tail's log amplifies it a little
    torch.float32: 2e-5,
    # the gradient is rounded to 8 bits when it leaves the softmax: 2**-9, and again by the product
    torch.bfloat16: 1.5e-2,
}
"""Largest error relative to the largest entry of the expectation."""

EITHER = pytest.mark.parametrize("divergence", sorted(DIVERGENCES))


def make_rows(
    num_rows: int, k: int, *, vocab_size: int = V, seed: int = 0, scale: float = 2.0
) -> TeacherRows:
    """Top-k labels of random teachers with their exact tail, and a hard label for every row."""
    random = torch.Generator().manual_seed(seed)
    logits_MV = scale * torch.randn(num_rows, vocab_size, generator=random, dtype=torch.float64)
    logprobs_MV = logits_MV.log_softmax(dim=-1)
    ordered_MV, ids_MV = logprobs_MV.sort(dim=-1, descending=True)
    rest = ordered_MV[:, k:]
    tail_M = rest.logsumexp(dim=-1) if k < vocab_size else torch.full((num_rows,), -torch.inf)
    return TeacherRows(
        hard_M=torch.randint(vocab_size, (num_rows,), generator=random),
        topk_ids_MK=ids_MV[:, :k],
        topk_logprobs_MK=ordered_MV[:, :k],
        log_tail_mass_M=tail_M.double(),
    )


def make_leaves(
    num_rows: int, *, rows_of_weight: int = V, seed: int = 1, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(num_rows, H, generator=random, dtype=torch.float64)
    weight = torch.randn(rows_of_weight, H, generator=random, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_()


def make_weights(num_rows: int) -> tuple[Tensor, Tensor]:
    """Soft weights from 0 to 1 and what is left of one."""
    soft_M = torch.linspace(0, 1, num_rows, dtype=torch.float64)
    return soft_M, 1 - soft_M


def fused(
    hidden: Tensor,
    weight: Tensor,
    rows: TeacherRows,
    divergence: str = "forward_kl",
    *,
    weights: tuple[Tensor, Tensor] | None = None,
    vocab_size: int = V,
) -> FusedTerms:
    soft_M, hard_M = weights or make_weights(len(rows))
    function: Divergence = load(DIVERGENCES[divergence])  # type: ignore[assignment]
    return fused_linear_loss(
        hidden,
        weight,
        rows,
        divergence=function,
        soft_weight_M=soft_M,
        hard_weight_M=hard_M,
        vocab_size=vocab_size,
    )


def gradients(total: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, leaves))


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale
    )


def only_soft(num_rows: int) -> tuple[Tensor, Tensor]:
    return torch.ones(num_rows, dtype=torch.float64), torch.zeros(num_rows, dtype=torch.float64)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows per matrix product, so that a few rows are several chunks, the last one short."""
    monkeypatch.setattr(fused_linear, "CHUNK_ROWS", 3)


# -- against the reference ------------------------------------------------------------------------
@EITHER
@pytest.mark.parametrize("k", [1, 5, V - 1, V])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients_equal_the_reference(
    divergence: str, k: int, dtype: torch.dtype
) -> None:
    rows = make_rows(8, k)
    hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in make_leaves(8))
    # the oracle sees the same rounded inputs, in float64
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    soft_M, hard_M = make_weights(8)
    # the product is rounded once to the dtype of its factors before the loss sees it
    logits = exact[0] @ exact[1].t()
    rounded = logits + ((hidden @ weight.t()).double() - logits).detach()
    expected = reference_loss(
        rounded, rows, divergence=divergence, soft_weight_M=soft_M, hard_weight_M=hard_M
    )
    found = fused(hidden, weight, rows, divergence).total
    value_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(found.detach(), expected.detach(), value_dtype)
    for one, other in zip(
        gradients(found, hidden, weight), gradients(expected, *exact), strict=True
    ):
        assert one.dtype == dtype
        assert_close(one, other, dtype)


@EITHER
def test_gradients_equal_finite_differences(divergence: str) -> None:
    """Independent of autograd: (f(x + h) - f(x - h)) / 2h has an error of order h**2 = 1e-10."""
    rows, (hidden, weight) = make_rows(3, 4, vocab_size=9), make_leaves(3, rows_of_weight=9)
    step = 1e-5
    for leaf, found in zip(
        (hidden, weight),
        gradients(fused(hidden, weight, rows, divergence, vocab_size=9).total, hidden, weight),
        strict=True,
    ):
        numeric = torch.empty_like(leaf)
        with torch.no_grad():
            for index in range(leaf.numel()):
                values = []
                for sign in (1, -1):
                    leaf.view(-1)[index] += sign * step
                    terms = fused(hidden, weight, rows, divergence, vocab_size=9)
                    values.append(float(terms.total))
                    leaf.view(-1)[index] -= sign * step
                numeric.view(-1)[index] = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(found, numeric, rtol=0, atol=1e-7)


@EITHER
def test_several_chunks_equal_the_reference(divergence: str, small_chunks: None) -> None:
    rows, (hidden, weight) = make_rows(8, 5), make_leaves(8)
    soft_M, hard_M = make_weights(8)
    expected = reference_loss(
        hidden @ weight.t(), rows, divergence=divergence, soft_weight_M=soft_M, hard_weight_M=hard_M
    )
    found = fused(hidden, weight, rows, divergence).total
    assert_close(found.detach(), expected.detach())
    for one, other in zip(
        gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True
    ):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing_beyond_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(10, 5)
    hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in make_leaves(10))
    results = []
    for chunk_rows in (10, 4):
        monkeypatch.setattr(fused_linear, "CHUNK_ROWS", chunk_rows)
        terms = fused(hidden, weight, rows)
        results.append([terms.total.detach(), *gradients(terms.total, hidden, weight)])
    for whole, chunked in zip(*results, strict=True):
        assert chunked.dtype == whole.dtype
        assert_close(chunked, whole, dtype)


def test_many_bfloat16_chunks_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 sum of 512 equal chunks stops growing once a chunk is below half a step."""
    monkeypatch.setattr(fused_linear, "CHUNK_ROWS", 1)
    rows = make_rows(1, 5)
    rows = rows._map(lambda tensor: tensor.expand(512, *tensor.shape[1:]).contiguous())
    hidden, weight = (leaf.detach().bfloat16() for leaf in make_leaves(1))
    weight.requires_grad_()
    (one,) = gradients(fused(hidden, weight, rows.rows(0, 1), weights=only_soft(1)).total, weight)
    (many,) = gradients(
        fused(hidden.expand(512, H).contiguous(), weight, rows, weights=only_soft(512)).total,
        weight,
    )
    assert_close(many / 512, one, torch.bfloat16)


@EITHER
def test_a_complete_top_k_gives_the_dense_divergence(divergence: str) -> None:
    rows, (hidden, weight) = make_rows(6, V), make_leaves(6)
    teacher = torch.empty(6, V, dtype=torch.float64)
    teacher.scatter_(1, rows.topk_ids_MK, rows.topk_logprobs_MK)
    student = (hidden @ weight.t()).log_softmax(dim=-1)
    first, second = (teacher, student) if divergence == "forward_kl" else (student, teacher)
    dense_M = (first.exp() * (first - second)).sum(dim=-1)
    found_M = fused(hidden, weight, rows, divergence, weights=only_soft(6)).soft_M
    torch.testing.assert_close(found_M, dense_M.detach(), rtol=0, atol=1e-9)


# -- invariants -----------------------------------------------------------------------------------
@EITHER
@given(
    seed=st.integers(0, 2**16),
    k=st.integers(1, V),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    teacher_scale=st.sampled_from([0.0, 1.0, 20.0]),
)
def test_the_soft_term_is_never_negative(
    divergence: str, seed: int, k: int, scale: float, teacher_scale: float
) -> None:
    rows = make_rows(4, k, seed=seed, scale=teacher_scale)
    hidden, weight = make_leaves(4, seed=seed, scale=scale)
    soft_M = fused(hidden, weight, rows, divergence, weights=only_soft(4)).soft_M
    assert float(soft_M.min()) >= -1e-10


@pytest.mark.parametrize("k", [1, 3, V - 1])
@EITHER
def test_merging_tokens_into_the_tail_never_raises_the_divergence(divergence: str, k: int) -> None:
    """The data-processing inequality; the complete top-k is the dense divergence."""
    hidden, weight = make_leaves(5)
    merged_M, dense_M = (
        fused(hidden, weight, make_rows(5, size), divergence, weights=only_soft(5)).soft_M
        for size in (k, V)
    )
    assert bool((merged_M <= dense_M + 1e-10).all())


@EITHER
def test_the_soft_term_is_zero_where_the_student_is_the_teacher(divergence: str) -> None:
    hidden, weight = make_leaves(4)
    logprobs = (hidden @ weight.t()).log_softmax(dim=-1).detach()
    values, ids = logprobs.sort(dim=-1, descending=True)
    rows = TeacherRows(ids[:, 0], ids[:, :6], values[:, :6], values[:, 6:].logsumexp(dim=-1))
    terms = fused(hidden, weight, rows, divergence, weights=only_soft(4))
    assert_close(terms.soft_M, torch.zeros(4))
    assert torch.equal(terms.student_argmax_M, ids[:, 0])
    for gradient in gradients(terms.total, hidden, weight):
        assert_close(gradient, torch.zeros_like(gradient))


@EITHER
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unused_entries_of_the_top_k_change_nothing(divergence: str, dtype: torch.dtype) -> None:
    rows = make_rows(5, 4)
    padded = replace(
        rows,
        topk_ids_MK=torch.nn.functional.pad(rows.topk_ids_MK, (0, 3), value=PADDING_ID),
        # whatever stands there
        topk_logprobs_MK=torch.nn.functional.pad(rows.topk_logprobs_MK, (0, 3), value=-0.1),
    )
    hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in make_leaves(5))
    results = []
    for labels in (rows, padded):
        terms = fused(hidden, weight, labels, divergence)
        results.append([terms.soft_M, terms.hard_M, *gradients(terms.total, hidden, weight)])
    for one, other in zip(*results, strict=True):
        assert_close(other, one, dtype)


def test_padding_does_not_hide_token_zero() -> None:
    """Token 0 is in the tail of every row; padding must not take its probability away."""
    rows = make_rows(1, 1)
    rows = replace(
        rows,
        topk_ids_MK=torch.tensor([[5, PADDING_ID]]),
        topk_logprobs_MK=torch.tensor([[math.log(0.5), -1.0]], dtype=torch.float64),
        log_tail_mass_M=torch.tensor([math.log(0.5)], dtype=torch.float64),
    )
    hidden, weight = torch.ones(1, 1).double(), torch.zeros(V, 1).double()
    with torch.no_grad():
        weight[0] = 10.0
    found = fused(hidden, weight, rows, weights=only_soft(1)).soft_M
    # student: z_0 = 10, 28 others 0; q_5 = 1 / (e^10 + 28), tail = 1 - q_5
    total = math.exp(10) + 28
    expected = 0.5 * math.log(0.5 * total) + 0.5 * math.log(0.5 * total / (total - 1))
    assert float(found) == pytest.approx(expected, rel=1e-12)


@EITHER
def test_splitting_a_batch_does_not_change_the_sum(divergence: str) -> None:
    rows, (hidden, weight) = make_rows(9, 5), make_leaves(9)
    soft_M, hard_M = make_weights(9)
    whole = fused(hidden, weight, rows, divergence).total
    parts = [
        fused(
            hidden[start:stop],
            weight,
            rows.rows(start, stop),
            divergence,
            weights=(soft_M[start:stop], hard_M[start:stop]),
        ).total
        for start, stop in ((0, 2), (2, 3), (3, 9))
    ]
    split = torch.stack(parts).sum()
    assert_close(split.detach(), whole.detach())
    for one, other in zip(
        gradients(split, hidden, weight), gradients(whole, hidden, weight), strict=True
    ):
        assert_close(one, other)


@EITHER
def test_renaming_the_tokens_does_not_change_the_loss(divergence: str) -> None:
    """Seen elsewhere: a head mask in sorted order applied to unsorted probabilities."""
    rows, (hidden, weight) = make_rows(6, 5), make_leaves(6)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(7))
    place = order.argsort()  # old id -> new id
    renamed = replace(rows, hard_M=place[rows.hard_M], topk_ids_MK=place[rows.topk_ids_MK])
    moved = weight.detach()[order].requires_grad_()
    one, other = fused(hidden, weight, rows, divergence), fused(hidden, moved, renamed, divergence)
    assert_close(other.soft_M, one.soft_M)
    assert_close(other.total.detach(), one.total.detach())
    (gradient,), (moved_gradient,) = gradients(one.total, weight), gradients(other.total, moved)
    assert_close(moved_gradient, gradient[order])


@EITHER
def test_the_order_of_the_stored_tokens_is_irrelevant(divergence: str) -> None:
    rows, (hidden, weight) = make_rows(4, 6), make_leaves(4)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    shuffled = replace(
        rows,
        topk_ids_MK=rows.topk_ids_MK[:, order],
        topk_logprobs_MK=rows.topk_logprobs_MK[:, order],
    )
    one, other = (
        fused(hidden, weight, rows, divergence),
        fused(hidden, weight, shuffled, divergence),
    )
    assert_close(other.soft_M, one.soft_M)


@pytest.mark.parametrize("num_rows", [2, 8])
def test_padding_of_the_vocabulary_gets_no_probability_and_no_gradient(
    num_rows: int, small_chunks: None
) -> None:
    rows = make_rows(num_rows, 5)
    hidden, weight = make_leaves(num_rows, rows_of_weight=V + 4)
    with torch.no_grad():
        weight[V:] += 100.0  # would take all the probability
    terms = fused(hidden, weight, rows)
    live = fused(hidden, weight[:V], rows)
    assert_close(terms.soft_M, live.soft_M)
    assert int(terms.student_argmax_M.max()) < V
    _, gradient = gradients(terms.total, hidden, weight)
    assert torch.equal(gradient[V:], torch.zeros(4, H, dtype=torch.float64))
    assert float(gradient[:V].abs().max()) > 0


def test_weights_scale_the_terms_of_their_row() -> None:
    rows, (hidden, weight) = make_rows(3, 5), make_leaves(3)
    soft_M = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    hard_M = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64)
    terms = fused(hidden, weight, rows, weights=(soft_M, hard_M))
    expected = (soft_M * terms.soft_M + hard_M * terms.hard_M).sum()
    assert_close(terms.total.detach(), expected)


def test_a_factor_on_the_loss_is_a_factor_on_the_gradients() -> None:
    rows, (hidden, weight) = make_rows(4, 5), make_leaves(4)
    once = gradients(fused(hidden, weight, rows).total, hidden, weight)
    thrice = gradients(fused(hidden, weight, rows).total * 3.0, hidden, weight)
    for one, other in zip(once, thrice, strict=True):
        assert_close(other, 3.0 * one)


def test_going_back_twice_gives_the_same_gradient_twice() -> None:
    rows, (hidden, weight) = make_rows(4, 5), make_leaves(4)
    total = fused(hidden, weight, rows).total * 2.0
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(total, (hidden, weight))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@EITHER
def test_the_written_gradient_passes_gradcheck(divergence: str) -> None:
    rows, (hidden, weight) = make_rows(4, 5), make_leaves(4)
    assert torch.autograd.gradcheck(
        lambda h, w: fused(h, w, rows, divergence=divergence).total, (hidden, weight)
    )


def test_a_leaf_that_needs_no_gradient_gets_none() -> None:
    rows, (hidden, weight) = make_rows(4, 5), make_leaves(4)
    (expected,) = gradients(fused(hidden, weight, rows).total, hidden)
    (found,) = gradients(fused(hidden, weight.detach(), rows).total, hidden)
    assert torch.equal(found, expected)
    with torch.inference_mode():
        assert not fused(hidden, weight, rows).total.requires_grad


@EITHER
def test_no_rows_give_zero_and_zero_gradients(divergence: str) -> None:
    """A rank without supervised tokens still goes backward, and finds no NaN."""
    rows, (hidden, weight) = make_rows(3, 5).rows(0, 0), make_leaves(0)
    terms = fused(hidden, weight, rows, divergence)
    assert terms.total.item() == 0.0
    assert terms.soft_M.shape == terms.hard_M.shape == terms.student_argmax_M.shape == (0,)
    hidden_gradient, weight_gradient = gradients(terms.total, hidden, weight)
    assert hidden_gradient.shape == (0, H)
    assert torch.equal(weight_gradient, torch.zeros_like(weight))


# -- the ends of the scale ------------------------------------------------------------------------
def one_row(logprobs: list[float], log_tail: float, hard: int = 0) -> TeacherRows:
    """Tokens 0, 1, ... with these log-probs."""
    return TeacherRows(
        hard_M=torch.tensor([hard]),
        topk_ids_MK=torch.arange(len(logprobs))[None],
        topk_logprobs_MK=torch.tensor([logprobs], dtype=torch.float64),
        log_tail_mass_M=torch.tensor([log_tail], dtype=torch.float64),
    )


def from_logits(logits: list[float], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Hidden state [1] and a head whose only column are these logits."""
    weight = torch.tensor(logits, dtype=dtype)[:, None]
    return torch.ones(1, 1, dtype=dtype), weight.requires_grad_()


@EITHER
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


@EITHER
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
