"""Random labels and heads, and the fused loss of both; shared by the tests of the fused path."""

from typing import Any

import torch
from torch import Tensor

from student_train.losses.base import FixedWeights, TeacherRows
from student_train.losses.config import DivergenceConfig, soft_config
from student_train.losses.fused_linear import FusedTerms, fused_linear_loss
from student_train.losses.linear_head import LinearHead
from student_train.losses.reference import reference_loss
from student_train.losses.soft_term import make_divergence

H = 6
V = 29
SCHEDULE = {"t": 0.4, "progress": 0.5}
"""Where a training stands, for divergences that move."""

TOLERANCE = {
    # sums of a few hundred terms, each rounded to 2**-53
    torch.float64: 1e-10,
    # 2**-24 per operation; the tail's log amplifies it a little
    torch.float32: 2e-5,
    # the gradient is rounded to 8 bits when it leaves the softmax: 2**-9, and again by the product
    torch.bfloat16: 2e-2,
}
"""Largest error relative to the largest entry of the expectation."""


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
    """Hidden states [M, H] and a head [V, H]."""
    random = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(num_rows, H, generator=random, dtype=torch.float64)
    weight = torch.randn(rows_of_weight, H, generator=random, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_()


def make_weights(num_rows: int) -> tuple[Tensor, Tensor]:
    """Soft weights from 0 to 1 and what is left of one."""
    soft_M = torch.linspace(0, 1, num_rows, dtype=torch.float64)
    return soft_M, 1 - soft_M


def only_soft(num_rows: int) -> tuple[Tensor, Tensor]:
    """Soft weights of one, hard weights of zero."""
    return torch.ones(num_rows, dtype=torch.float64), torch.zeros(num_rows, dtype=torch.float64)


def fused(
    hidden: Tensor,
    head: Tensor | LinearHead,
    rows: TeacherRows,
    divergence: str | DivergenceConfig | None = "forward_kl",
    *,
    weights: tuple[Tensor, Tensor] | None = None,
    entropy_weight_M: Tensor | None = None,
    vocab_size: int = V,
) -> FusedTerms:
    """The fused loss with the weights of :func:`make_weights`."""
    soft_M, hard_M = weights or make_weights(len(rows))
    config = soft_config(divergence) if isinstance(divergence, str) else divergence
    return fused_linear_loss(
        hidden,
        head if isinstance(head, LinearHead) else LinearHead(head),
        rows,
        divergence=None if config is None else make_divergence(config, schedule=SCHEDULE),
        weights=FixedWeights(soft_M, hard_M),
        entropy_weight_M=entropy_weight_M,
        vocab_size=vocab_size,
    )


def expected_loss(
    logits: Tensor, rows: TeacherRows, divergence: str | DivergenceConfig = "forward_kl"
) -> Tensor:
    """The reference with the same weights."""
    soft_M, hard_M = make_weights(len(rows))
    return reference_loss(
        logits,
        rows,
        divergence=divergence,
        soft_weight_M=soft_M,
        hard_weight_M=hard_M,
        schedule=SCHEDULE,
    )


def gradients(total: Tensor, *leaves: Tensor) -> list[Tensor]:
    """Gradients of a scalar."""
    return list(torch.autograd.grad(total, leaves))


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Equal within the tolerance of a dtype."""
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * scale
    )


def assert_same_loss(found: Tensor, expected: Tensor, *leaves: Tensor, **options: Any) -> None:
    """Two scalars have the same value and the same gradients."""
    assert_close(found.detach(), expected.detach(), **options)
    for one, other in zip(gradients(found, *leaves), gradients(expected, *leaves), strict=True):
        assert_close(one, other, **options)


# -- single rows ----------------------------------------------------------------------------------
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
