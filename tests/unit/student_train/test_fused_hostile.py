"""Value and gradient of the fused loss where either side is extreme, against the reference.

The leaf is the bias of the head, so a student's logits are whatever a test wants, -inf among them.
"""

import math

import pytest
import torch
from torch import Tensor

from student_train.errors import NonFiniteLossError
from student_train.losses import DIVERGENCES
from student_train.losses.base import NEG_INF, PADDING_ID, TeacherRows
from student_train.losses.config import soft_config
from student_train.losses.linear_head import LinearHead
from student_train.losses.reference import reference_soft
from tests.unit.student_train.fused_rows import (
    SCHEDULE,
    TOLERANCE,
    assert_close,
    fused,
    make_leaves,
    make_rows,
    only_soft,
)

EVERY = pytest.mark.parametrize("name", DIVERGENCES)
HUGE = 2**-24 * 1e4
"""Error of a probability in float32 where logits are as large as 1e4: that of its log."""

V = 12
OUT_OF_REACH = [5, 10, 11]
"""Tokens that some students never say; they are in the tail of every teacher, with others."""


def random_logits(seed: int) -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def label(kind: str, k: int) -> TeacherRows:
    """Labels of a teacher whose ids are its ranks."""
    log_p = (2 * random_logits(3)).log_softmax(dim=-1).sort(descending=True).values
    head, tail = log_p[:k], log_p[k:]
    if kind == "one-hot":
        head, tail = torch.full_like(head, NEG_INF), torch.full_like(tail, NEG_INF)
        head[0] = 0.0
    elif kind.startswith("tail of"):
        mass = float(kind.removeprefix("tail of "))
        log_mass = math.log(mass) if mass > 0 else NEG_INF
        head = head.log_softmax(dim=-1) + math.log1p(-mass)
        tail = tail.log_softmax(dim=-1) + log_mass
    return TeacherRows(
        hard_M=torch.tensor([1]),
        topk_ids_MK=torch.arange(k)[None],
        topk_logprobs_MK=head[None],
        log_tail_mass_M=tail.logsumexp(dim=-1)[None],
    )


def students() -> dict[str, Tensor]:
    some = random_logits(4)
    hidden = some.clone()
    hidden[OUT_OF_REACH] = NEG_INF
    sure, far = torch.full((V,), -1e4).double(), torch.full((V,), -1e4).double()
    sure[0], far[V - 1] = 1e4, 1e4
    return {
        "ordinary": some,
        "huge": 1e4 * some,
        "some tokens never": hidden,
        "sure of a stored token": sure,
        "sure of a token of the tail": far,
    }


@EVERY
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "teacher",
    ["ordinary", "one-hot", "tail of 0", "tail of 1e-10", "tail of 0.9999999999"],
)
def test_extremes_of_both_sides_equal_the_reference(
    name: str, k: int, dtype: torch.dtype, teacher: str
) -> None:
    rows, config = label(teacher, k), soft_config(name)
    hidden, weight = torch.zeros(1, 2, dtype=dtype), torch.zeros(V, 2, dtype=dtype)
    for student, logits_V in students().items():
        is_huge = student not in ("ordinary", "some tokens never")
        rounding = HUGE if dtype == torch.float32 and is_huge else 0.0
        bias = logits_V.to(dtype).requires_grad_()
        found = fused(
            hidden, LinearHead(weight, bias), rows, config, weights=only_soft(1), vocab_size=V
        )
        exact = bias.detach().double().requires_grad_()
        expected = reference_soft(exact[None], rows, divergence=config, schedule=SCHEDULE)
        assert_close(found.soft_M, expected.detach(), dtype)
        (gradient,) = torch.autograd.grad(found.total, bias)
        (slope,) = torch.autograd.grad(expected.sum(), exact)
        allowed = (TOLERANCE[dtype] + rounding) * max(1.0, float(slope.abs().max()))
        torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=allowed)
        assert bool((gradient[torch.isneginf(logits_V)] == 0).all())


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stored_tokens_without_mass_on_either_side_change_nothing(
    name: str, dtype: torch.dtype
) -> None:
    """A padded vocabulary that a model masks by -inf, and a teacher that stores its tokens."""
    rows = label("tail of 0", 4)
    logits_V = students()["some tokens never"]
    padded = TeacherRows(
        hard_M=rows.hard_M,
        topk_ids_MK=torch.tensor([[0, 1, 2, 3, 11, 5, PADDING_ID]]),
        topk_logprobs_MK=torch.nn.functional.pad(rows.topk_logprobs_MK, (0, 3), value=NEG_INF),
        log_tail_mass_M=rows.log_tail_mass_M,
    )
    results = []
    for labels in (rows, padded):
        hidden, weight = torch.zeros(1, 2, dtype=dtype), torch.zeros(V, 2, dtype=dtype)
        bias = logits_V.to(dtype).requires_grad_()
        terms = fused(
            hidden, LinearHead(weight, bias), labels, name, weights=only_soft(1), vocab_size=V
        )
        results.append((terms.soft_M, torch.autograd.grad(terms.total, bias)[0]))
    for one, other in zip(*results, strict=True):
        assert_close(other, one, dtype)


def test_a_token_that_only_the_teacher_says_is_infinitely_wrong_and_named() -> None:
    rows = make_rows(3, 4, vocab_size=V)
    hidden, weight = make_leaves(3, rows_of_weight=V)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[rows.topk_ids_MK[1, 0]] = NEG_INF
    hit = (rows.topk_ids_MK == rows.topk_ids_MK[1, 0]).any(dim=-1).nonzero().flatten().tolist()
    expected = rf"loss of rows \[{', '.join(map(str, hit))}\] of 3 is not finite \(soft \[inf"
    with pytest.raises(NonFiniteLossError, match=expected):
        fused(hidden, LinearHead(weight, bias), rows, weights=only_soft(3), vocab_size=V)
    # bounded divergences are not
    terms = fused(hidden, LinearHead(weight, bias), rows, "jsd", weights=only_soft(3), vocab_size=V)
    assert bool(torch.isfinite(terms.soft_M).all())


@EVERY
def test_a_vocabulary_of_real_size_in_bfloat16_equals_the_reference(name: str) -> None:
    """152 064 rows of the embedding, of which the last are padding; K is 64."""
    vocab_size, width = 151_936, 8
    rows = make_rows(3, 64, vocab_size=vocab_size, scale=4.0)
    random = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, width, generator=random).bfloat16().requires_grad_()
    weight = torch.randn(vocab_size + 128, width, generator=random).bfloat16().requires_grad_()
    terms = fused(hidden, weight, rows, name, weights=only_soft(3), vocab_size=vocab_size)
    gradients = torch.autograd.grad(terms.total, (hidden, weight))
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    logits = exact[0] @ exact[1][:vocab_size].t()
    # the product is rounded once to the dtype of its factors before the loss sees it
    rounding = (hidden @ weight[:vocab_size].t()).double() - logits
    expected = reference_soft(logits + rounding.detach(), rows, divergence=name, schedule=SCHEDULE)
    assert_close(terms.soft_M, expected.detach(), torch.float32)
    for one, other in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert_close(one, other, torch.bfloat16)
    assert bool((gradients[1][vocab_size:] == 0).all())
