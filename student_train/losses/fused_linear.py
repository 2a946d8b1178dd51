"""Hidden states x lm_head, divergence and cross-entropy in one chunked pass.

Written on the k+1 categories, every divergence has a gradient of one shape with respect to the
student's logits: softmax times *one scalar per row* plus corrections at the K stored tokens. With
g the derivative with respect to the categories' log-probs, s the student's tail mass and G the sum
of g (``docs/losses.md`` section 3)::

    dL/dz_j = g_j - q_j G                  for a stored token j
    dL/dz_j = q_j (g_tail / s - G)         for every other token

Cross-entropy has the same shape, so soft and hard terms share one softmax and no [M, V] tensor
lives longer than a chunk. Gradients are made in the forward pass, where the logits are at hand.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from student_train.errors import NonFiniteLossError
from student_train.losses.base import PADDING_ID, Divergence, TeacherRows

CHUNK_ROWS = 1024
"""Rows per matrix product: below 256 the products are too thin to be fast (measured on CPU)."""

NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class FusedTerms:
    """Result of :func:`fused_linear_loss`; shapes as in ``LossTerms``."""

    total: Tensor
    soft_M: Tensor
    hard_M: Tensor
    student_argmax_M: Tensor


def fused_linear_loss(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    rows: TeacherRows,
    *,
    divergence: Divergence,
    soft_weight_M: Tensor,
    hard_weight_M: Tensor,
    vocab_size: int,
) -> FusedTerms:
    r"""Sum over rows of ``soft_weight * divergence + hard_weight * cross_entropy``.

    Args:
        hidden_MH: float[M, H], hidden states of the supervised positions.
        weight_VH: float[V, H], output embedding. Rows at ``vocab_size`` and beyond are padding
            and get no probability.
        rows: Teacher labels of the same M positions.
        divergence: Soft term on the k+1 categories.
        soft_weight_M: float32[M], detached.
        hard_weight_M: float32[M], detached.
        vocab_size: Effective vocabulary, at most V.

    Returns:
        ``total`` in nats with gradients for ``hidden_MH`` and ``weight_VH``, computed in float32
        (float64 for float64 inputs), and detached terms of every row.

    Raises:
        NonFiniteLossError: if a row's loss is NaN or infinite, naming the rows.
    """
    total, soft_M, hard_M, argmax_M = _FusedLinear.apply(  # type: ignore[no-untyped-call]
        hidden_MH, weight_VH, rows, divergence, soft_weight_M, hard_weight_M, vocab_size
    )
    bad = ~(torch.isfinite(soft_M) & torch.isfinite(hard_M))
    if bool(bad.any()):
        found = bad.nonzero().flatten()[:8].tolist()
        raise NonFiniteLossError(
            f"the loss of rows {found} of {len(rows)} is not finite "
            f"(soft {soft_M[found].tolist()}, hard {hard_M[found].tolist()}); "
            "lower the learning rate or check the student's weights"
        )
    return FusedTerms(total, soft_M, hard_M, argmax_M)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        rows: TeacherRows,
        divergence: Divergence,
        soft_weight_M: Tensor,
        hard_weight_M: Tensor,
        vocab_size: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.float64 if hidden_MH.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        live_VH = weight_VH[:vocab_size]
        grad_hidden = torch.empty_like(hidden_MH) if needs_hidden else None
        # one chunk's product needs no accumulator: the matrix product itself sums in float32
        several = len(rows) > CHUNK_ROWS
        grad_weight = (
            torch.zeros_like(weight_VH, dtype=dtype if several else weight_VH.dtype)
            if needs_weight
            else None
        )
        pieces = []
        for start in range(0, len(rows), CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, len(rows))
            hidden = hidden_MH[start:stop]
            logits = (hidden @ live_VH.t()).to(dtype)
            pieces.append(
                _chunk_terms(
                    logits,
                    rows.rows(start, stop),
                    divergence,
                    soft_weight_M[start:stop].to(dtype),
                    hard_weight_M[start:stop].to(dtype),
                )
            )
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = logits.to(hidden.dtype)  # _chunk_terms left the gradient here
            if grad_hidden is not None:
                torch.mm(grad_logits, live_VH, out=grad_hidden[start:stop])
            if grad_weight is not None:
                if several:
                    grad_weight[:vocab_size] += grad_logits.t() @ hidden
                else:
                    torch.mm(grad_logits.t(), hidden, out=grad_weight[:vocab_size])
        soft_M, hard_M, argmax_M = (
            torch.cat(parts) if parts else hidden_MH.new_zeros(0, dtype=dtype)
            for parts in (zip(*pieces, strict=True) if pieces else ((), (), ()))
        )
        weights = (soft_weight_M.to(dtype) * soft_M, hard_weight_M.to(dtype) * hard_M)
        ctx.save_for_backward(grad_hidden, grad_weight)  # type: ignore[arg-type]
        ctx.weight_dtype = weight_VH.dtype  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(soft_M, hard_M, argmax_M)
        return sum(weights).sum(), soft_M, hard_M, argmax_M  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx: FunctionCtx, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)  # type: ignore[attr-defined]
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunk_terms(
    logits_MV: Tensor,
    rows: TeacherRows,
    divergence: Divergence,
    soft_weight_M: Tensor,
    hard_weight_M: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft and hard term and argmax of every row; replaces the logits by the gradient."""
    unused = rows.topk_ids_MK == PADDING_ID
    # an unused entry points at the row's first token with logit -inf and gradient 0
    ids_MK = torch.where(unused, rows.topk_ids_MK[:, :1], rows.topk_ids_MK)
    argmax_M = logits_MV.argmax(dim=-1)
    stored_MK = logits_MV.gather(-1, ids_MK).masked_fill(unused, NEG_INF)
    hard_logit_M1 = logits_MV.gather(-1, rows.hard_M.unsqueeze(-1))

    # The tail by masking, never as one minus the rest: 1 - sum cancels when the tail is small.
    logits_MV.scatter_(-1, ids_MK, NEG_INF)
    top_M1 = logits_MV.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(logits_MV.dtype).min)
    tail_MV = logits_MV.sub_(top_M1).exp_()  # 0 at the stored tokens
    sum_M1 = tail_MV.sum(dim=-1, keepdim=True)
    tail_lse_M1 = top_M1 + sum_M1.log()
    lse_M1 = torch.logaddexp(stored_MK.logsumexp(dim=-1, keepdim=True), tail_lse_M1)

    student_MC = torch.cat([stored_MK, tail_lse_M1], dim=-1) - lse_M1
    soft_M, grad_MC = divergence(rows.categories(logits_MV.dtype), student_MC)
    hard_M = (lse_M1 - hard_logit_M1).squeeze(-1)

    soft_weight, hard_weight = soft_weight_M.unsqueeze(-1), hard_weight_M.unsqueeze(-1)
    grad_sum_M1 = grad_MC.sum(dim=-1, keepdim=True)
    student_tail_M1 = student_MC[:, -1:].exp()
    has_tail = student_tail_M1 > 0
    per_tail = torch.where(has_tail, grad_MC[:, -1:] / student_tail_M1, 0.0)
    scale_M1 = soft_weight * (per_tail - grad_sum_M1) + hard_weight
    # tail_MV holds exp(z - top); exp(top - lse) turns it into the student's probabilities
    tail_MV.mul_(torch.where(has_tail, scale_M1 * (top_M1 - lse_M1).exp(), 0.0))
    stored_q_MK = student_MC[:, :-1].exp()
    grad_stored_MK = (
        soft_weight * (grad_MC[:, :-1] - stored_q_MK * grad_sum_M1) + hard_weight * stored_q_MK
    ).masked_fill(unused, 0.0)
    tail_MV.scatter_add_(-1, ids_MK, grad_stored_MK)
    tail_MV.scatter_add_(-1, rows.hard_M.unsqueeze(-1), -hard_weight)
    return soft_M, hard_M, argmax_M
