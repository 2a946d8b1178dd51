"""The fast loss equals the obvious one, in value and in gradient, whatever the shapes."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from student_train.losses import DIVERGENCES, head_chunks
from student_train.losses.base import PADDING_ID, TeacherRows
from student_train.losses.config import DivergenceConfig, soft_config
from student_train.losses.linear_head import LinearHead
from student_train.losses.reference import dense_divergence
from tests.unit.student_train.fused_rows import (
    SCHEDULE,
    H,
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

EVERY = pytest.mark.parametrize("divergence", DIVERGENCES)
WITHOUT_DETACHED_PARTS = pytest.mark.parametrize(
    "divergence",
    [
        *sorted({*DIVERGENCES} - {"adaptive_kl", "taid"}),
        soft_config({"type": "adaptive_kl", "through_weights": True}),
    ],
    ids=str,
)
"""Their written gradient is that of their value. TAID's target is a constant to its gradient."""
MERGEABLE = pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
"""f-divergences: merging outcomes cannot raise them."""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows per product, two per sweep: a few rows are several of both, the last one short."""
    monkeypatch.setattr(head_chunks, "CHUNK_ROWS", 3)
    monkeypatch.setattr(head_chunks, "BLOCK_BYTES", 2 * V * 8)


# -- against the reference ------------------------------------------------------------------------
@EVERY
@pytest.mark.parametrize("k", [1, 5, V - 1, V])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients_equal_the_reference(
    divergence: str, k: int, dtype: torch.dtype
) -> None:
    rows = make_rows(8, k)
    hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in make_leaves(8))
    # the oracle sees the same rounded inputs, in float64
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    # the product is rounded once to the dtype of its factors before the loss sees it
    logits = exact[0] @ exact[1].t()
    rounded = logits + ((hidden @ weight.t()).double() - logits).detach()
    expected = expected_loss(rounded, rows, divergence)
    found = fused(hidden, weight, rows, divergence).total
    value_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(found.detach(), expected.detach(), value_dtype)
    for one, other in zip(
        gradients(found, hidden, weight), gradients(expected, *exact), strict=True
    ):
        assert one.dtype == dtype
        assert_close(one, other, dtype)


@WITHOUT_DETACHED_PARTS
def test_gradients_equal_finite_differences(divergence: str | DivergenceConfig) -> None:
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


@EVERY
def test_several_chunks_equal_the_reference(divergence: str, small_chunks: None) -> None:
    rows, (hidden, weight) = make_rows(8, 5), make_leaves(8)
    assert_same_loss(
        fused(hidden, weight, rows, divergence).total,
        expected_loss(hidden @ weight.t(), rows, divergence),
        hidden,
        weight,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing_beyond_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(10, 5)
    hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in make_leaves(10))
    results = []
    for chunk_rows in (10, 4):
        monkeypatch.setattr(head_chunks, "CHUNK_ROWS", chunk_rows)
        terms = fused(hidden, weight, rows)
        results.append([terms.total.detach(), *gradients(terms.total, hidden, weight)])
    for whole, chunked in zip(*results, strict=True):
        assert chunked.dtype == whole.dtype
        assert_close(chunked, whole, dtype)


def test_many_bfloat16_chunks_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 sum of 512 equal chunks stops growing once a chunk is below half a step."""
    monkeypatch.setattr(head_chunks, "CHUNK_ROWS", 1)
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


@EVERY
def test_a_complete_top_k_gives_the_dense_divergence(divergence: str) -> None:
    rows, (hidden, weight) = make_rows(6, V), make_leaves(6)
    teacher = torch.empty(6, V, dtype=torch.float64)
    teacher.scatter_(1, rows.topk_ids_MK, rows.topk_logprobs_MK)
    student = (hidden @ weight.t()).log_softmax(dim=-1).detach()
    dense_M = dense_divergence(divergence, teacher, student, schedule=SCHEDULE)
    found_M = fused(hidden, weight, rows, divergence, weights=only_soft(6)).soft_M
    torch.testing.assert_close(found_M, dense_M, rtol=0, atol=1e-9)


# -- invariants -----------------------------------------------------------------------------------
@MERGEABLE
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
@MERGEABLE
def test_merging_tokens_into_the_tail_never_raises_the_divergence(divergence: str, k: int) -> None:
    """The data-processing inequality; the complete top-k is the dense divergence."""
    hidden, weight = make_leaves(5)
    merged_M, dense_M = (
        fused(hidden, weight, make_rows(5, size), divergence, weights=only_soft(5)).soft_M
        for size in (k, V)
    )
    assert bool((merged_M <= dense_M + 1e-10).all())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
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


@EVERY
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


@EVERY
def test_a_token_stored_twice_counts_once(divergence: str) -> None:
    rows, (hidden, weight) = make_rows(5, 4), make_leaves(5)
    again = [0, 2, 3]
    doubled = replace(
        rows,
        topk_ids_MK=torch.cat([rows.topk_ids_MK, rows.topk_ids_MK[:, again]], dim=-1),
        topk_logprobs_MK=torch.cat([rows.topk_logprobs_MK, rows.topk_logprobs_MK[:, again]], -1),
    )
    one, other = (fused(hidden, weight, labels, divergence) for labels in (rows, doubled))
    assert_close(other.soft_M, one.soft_M)
    assert torch.equal(other.student_argmax_M, one.student_argmax_M)
    assert_same_loss(other.total, one.total, hidden, weight)


@EVERY
@pytest.mark.parametrize("width", [0, 2])
def test_a_row_that_stores_nothing_has_its_tail_as_only_category(
    divergence: str, width: int, small_chunks: None
) -> None:
    """Both sides are sure of the only category there is; what is left is the hard label."""
    rows, (hidden, weight) = make_rows(5, 3), make_leaves(5)
    empty = replace(
        rows,
        topk_ids_MK=torch.full((5, width), PADDING_ID),
        topk_logprobs_MK=torch.zeros(5, width, dtype=torch.float64),
        log_tail_mass_M=torch.zeros(5, dtype=torch.float64),
    )
    found = fused(hidden, weight, empty, divergence)
    expected = fused(hidden, weight, rows, None, weights=(torch.zeros(5), make_weights(5)[1]))
    assert_close(found.soft_M, torch.zeros(5))
    assert torch.equal(found.student_argmax_M, (hidden @ weight.t()).argmax(dim=-1))
    assert_same_loss(found.total, expected.total, hidden, weight)


def test_rows_with_and_without_stored_tokens_live_together(small_chunks: None) -> None:
    rows, (hidden, weight) = make_rows(6, 4), make_leaves(6)
    ids = rows.topk_ids_MK.clone()
    ids[2], ids[4, 1:] = PADDING_ID, PADDING_ID
    rows = replace(rows, topk_ids_MK=ids)
    assert_same_loss(
        fused(hidden, weight, rows).total,
        expected_loss(hidden @ weight.t(), rows),
        hidden,
        weight,
    )


@EVERY
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


@EVERY
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


@EVERY
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


@WITHOUT_DETACHED_PARTS
@pytest.mark.parametrize("chunk_rows", [1, 3, 8])
def test_the_written_gradient_passes_gradcheck(
    divergence: str | DivergenceConfig, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_chunks, "CHUNK_ROWS", chunk_rows)
    rows, (hidden, weight) = make_rows(4, 5), make_leaves(4)
    bias = torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w, b: fused(h, LinearHead(w, b), rows, divergence=divergence).total,
        (hidden, weight, bias),
    )


def test_a_leaf_that_needs_no_gradient_gets_none() -> None:
    rows, (hidden, weight) = make_rows(4, 5), make_leaves(4)
    (expected,) = gradients(fused(hidden, weight, rows).total, hidden)
    (found,) = gradients(fused(hidden, weight.detach(), rows).total, hidden)
    assert torch.equal(found, expected)
    with torch.inference_mode():
        assert not fused(hidden, weight, rows).total.requires_grad


@EVERY
def test_no_rows_give_zero_and_zero_gradients(divergence: str) -> None:
    """A rank without supervised tokens still goes backward, and finds no NaN."""
    rows, (hidden, weight) = make_rows(3, 5).rows(0, 0), make_leaves(0)
    terms = fused(hidden, weight, rows, divergence)
    assert terms.total.item() == 0.0
    assert terms.soft_M.shape == terms.hard_M.shape == terms.student_argmax_M.shape == (0,)
    hidden_gradient, weight_gradient = gradients(terms.total, hidden, weight)
    assert hidden_gradient.shape == (0, H)
    assert torch.equal(weight_gradient, torch.zeros_like(weight))
