"""The fused loss through every kind of head: bias, cap, scale, padding, low-rank factors."""

import pytest
import torch
from torch import Tensor

from student_train.losses import head_chunks
from student_train.losses.linear_head import LinearHead
from tests.unit.student_train.fused_rows import (
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
)

PADDING = 3
EVERY_HEAD = pytest.mark.parametrize(
    ("softcap", "scale", "with_bias"),
    [(None, 1.0, True), (2.0, 1.0, False), (None, 0.0625, False), (5.0, 0.3, True)],
)


@pytest.fixture(params=[3, 512])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several products, the last one short, or one."""
    monkeypatch.setattr(head_chunks, "CHUNK_ROWS", request.param)
    monkeypatch.setattr(head_chunks, "BLOCK_BYTES", 2 * V * 8)


def make_bias() -> Tensor:
    random = torch.Generator().manual_seed(9)
    return torch.randn(V + PADDING, generator=random, dtype=torch.float64).requires_grad_()


@EVERY_HEAD
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients_equal_the_reference(
    softcap: float | None, scale: float, with_bias: bool, dtype: torch.dtype, chunks: None
) -> None:
    rows = make_rows(7, 5)
    leaves = [*make_leaves(7, rows_of_weight=V + PADDING), make_bias()][: 3 if with_bias else 2]
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = fused(leaves[0], LinearHead(*leaves[1:], softcap=softcap, scale=scale), rows).total
    raw = scale * torch.nn.functional.linear(exact[0], *exact[1:])
    # the product is rounded to the dtype of its factors before the loss sees it
    product = LinearHead(*leaves[1:], scale=scale).logits(leaves[0])
    raw = raw + (product.double() - raw).detach()
    logits = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    expected = expected_loss(logits[:, :V], rows)
    value_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(found.detach(), expected.detach(), value_dtype)
    found_gradients = gradients(found, *leaves)
    for one, other in zip(found_gradients, gradients(expected, *exact), strict=True):
        assert one.dtype == dtype
        assert_close(one, other, dtype)
    for gradient in found_gradients[1:]:
        assert torch.equal(gradient[V:], torch.zeros_like(gradient[V:]))


@EVERY_HEAD
def test_all_logits_of_a_head_are_those_that_the_loss_sees(
    softcap: float | None, scale: float, with_bias: bool
) -> None:
    rows, (hidden, weight) = make_rows(6, 5), make_leaves(6, rows_of_weight=V + PADDING)
    head = LinearHead(weight, make_bias() if with_bias else None, softcap, scale)
    logits = head.logits(hidden)
    assert logits.shape == (6, V + PADDING)
    expected = expected_loss(logits[:, :V], rows)
    assert_same_loss(fused(hidden, head, rows).total, expected, hidden, weight)


def test_a_tied_embedding_gets_both_of_its_gradients() -> None:
    """The embedding of token m is the hidden state of row m."""
    rows, (_, weight) = make_rows(5, 4), make_leaves(5)
    (found,) = gradients(fused(weight[:5], weight, rows).total, weight)
    (expected,) = gradients(expected_loss(weight[:5] @ weight.t(), rows), weight)
    assert_close(found, expected)


def test_low_rank_factors_get_their_gradient_through_the_merged_weight(chunks: None) -> None:
    rows, (hidden, weight) = make_rows(7, 5), make_leaves(7)
    random = torch.Generator().manual_seed(3)
    down = torch.randn(2, H, generator=random, dtype=torch.float64).requires_grad_()
    up = torch.randn(V, 2, generator=random, dtype=torch.float64).requires_grad_()
    frozen = weight.detach()
    found = fused(hidden, frozen + 0.5 * up @ down, rows).total
    expected = expected_loss(hidden @ frozen.t() + 0.5 * hidden @ down.t() @ up.t(), rows)
    assert_same_loss(found, expected, hidden, up, down)


def test_a_frozen_head_with_a_bias_that_learns() -> None:
    rows, (hidden, weight) = make_rows(7, 5), make_leaves(7)
    bias = make_bias()[:V].detach().requires_grad_()
    found = fused(hidden.detach(), LinearHead(weight.detach(), bias), rows).total
    expected = expected_loss(hidden.detach() @ weight.detach().t() + bias, rows)
    assert_same_loss(found, expected, bias)


def test_a_cap_far_above_the_logits_changes_nothing() -> None:
    rows, (hidden, weight) = make_rows(4, 5), make_leaves(4)
    soft_M, hard_M = make_weights(4)
    plain = fused(hidden, weight, rows, weights=(soft_M, hard_M))
    capped = fused(hidden, LinearHead(weight, softcap=1e6), rows, weights=(soft_M, hard_M))
    # tanh(x) = x - x ** 3 / 3: relative to a logit of 10 and a cap of 1e6 that is 3e-11
    torch.testing.assert_close(capped.soft_M, plain.soft_M, rtol=1e-8, atol=0)
