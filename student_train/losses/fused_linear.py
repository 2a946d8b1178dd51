"""Hidden states x lm_head, divergence and cross-entropy in one chunked pass.

Written on the k+1 categories, every divergence has a gradient of one shape with respect to the
student's logits: softmax times *one scalar per row* plus corrections at the K stored tokens
(``docs/losses.md`` section 3). Cross-entropy has the same shape, so soft and hard terms share one
softmax and no [M, V] tensor lives longer than a chunk. Gradients are made in the forward pass,
where the logits are at hand.

What is where: the matrix products and their buffer are in ``head_chunks.py``, the two sweeps over
a block of logits in ``row_kernel.py``, terms and gradient of a row in ``row_terms.py``, the
gradient of the embedding in ``head_gradient.py``.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_train.errors import NonFiniteLossError
from student_train.losses.base import (
    NEG_INF,
    PADDING_ID,
    Divergence,
    RowWeighting,
    TeacherRows,
)
from student_train.losses.head_chunks import Block, HeadChunks
from student_train.losses.head_gradient import BiasGradient, WeightGradient, scaled
from student_train.losses.linear_head import LinearHead
from student_train.losses.row_kernel import KernelOptions
from student_train.losses.row_terms import RowWeights, row_terms
from student_train.losses.soft_term import SoftTerm, as_soft_term


@dataclass(frozen=True, slots=True)
class FusedTerms:
    """Result of :func:`fused_linear_loss`; everything but ``total`` is detached."""

    total: Tensor
    """Scalar with gradient: weighted terms in nats, summed over rows."""
    soft_M: Tensor
    """float[M]: unweighted divergence; 0 without a soft term."""
    hard_M: Tensor
    """float[M]: unweighted cross-entropy."""
    student_argmax_M: Tensor
    """int64[M]: the student's likeliest token."""
    entropy_M: Tensor | None
    """float[M]: the student's entropy in nats; None unless it has a weight."""
    soft_weight_M: Tensor
    """float[M]: weight that the divergence got."""
    hard_weight_M: Tensor
    """float[M]: weight that the cross-entropy got."""
    student_MC: Tensor
    """float[M, C]: the student's log-probs of the categories at temperature 1."""
    topk_overlap_M: Tensor | None
    """float[M]: share of the stored tokens among as many likeliest ones of the student; None unless
    it is asked for."""


def fused_linear_loss(
    hidden_MH: Tensor,
    head: LinearHead,
    rows: TeacherRows,
    *,
    divergence: Divergence | None,
    weights: RowWeighting,
    entropy_weight_M: Tensor | None = None,
    topk_overlap: bool = False,
    vocab_size: int,
) -> FusedTerms:
    r"""Sum over rows of a weighted divergence, cross-entropy and negative entropy.

    .. math:: \sum_m a_m D(p_m, q_m) + b_m (-\log q_m[y_m]) + c_m \sum_j q_{mj} \log q_{mj}

    Args:
        hidden_MH: float[M, H], hidden states of the supervised positions.
        head: Output embedding and what follows it. Rows of the weight at ``vocab_size`` and
            beyond are padding and get neither probability nor gradient.
        rows: Teacher labels of the same M positions. Of a token that is stored twice the first
            entry counts.
        divergence: Soft term on the k+1 categories: a function of two [M, C] tensors, or a
            ``SoftTerm``, which may have a temperature; the hard term is at temperature 1. None
            for hard labels alone.
        weights: a and b of every row: ``FixedWeights``, or a function of the student's log-prob of
            the hard label, which is known in the pass before the gradient is written.
        entropy_weight_M: float[M], c; detached. None computes no entropy.
        topk_overlap: Whether the overlap of the likeliest tokens is computed: for evaluation, it
            takes about as long as a softmax.
        vocab_size: Effective vocabulary, at most V.

    Returns:
        ``total`` with gradients for hidden states, weight and bias, computed in float32 (float64
        for float64 inputs), and detached terms of every row.

    Raises:
        NonFiniteLossError: if a row's loss is NaN or infinite, naming the rows.
    """
    options = KernelOptions(
        vocab_size,
        head.softcap,
        entropy=entropy_weight_M is not None,
        overlap=topk_overlap,
    )
    soft = None if divergence is None else as_soft_term(divergence)
    if soft is not None:
        options = replace(options, temperature=soft.temperature, sampled=soft.sampled)
    labels = _Labels(_with_an_entry(rows), soft, weights, entropy_weight_M)
    terms = FusedTerms(
        *_FusedLinear.apply(*_scaled(hidden_MH, head), labels, options)  # type: ignore[no-untyped-call]
    )
    if rows.topk_ids_MK.shape[1] == 0:
        terms = replace(terms, student_MC=terms.student_MC[:, -1:])
    _check_finite(soft=terms.soft_M, hard=terms.hard_M, entropy=terms.entropy_M)
    return terms


@dataclass(frozen=True, slots=True)
class _Labels:
    """What the student is compared with."""

    rows: TeacherRows
    soft: SoftTerm | None
    weights: RowWeighting
    entropy_weight_M: Tensor | None


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels: _Labels,
        options: KernelOptions,
    ) -> tuple[Tensor | None, ...]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        work = HeadChunks(hidden_MH, weight_VH, bias_V, options)
        grad_hidden_MH = torch.empty_like(hidden_MH) if needs_hidden else None
        grad_weight = WeightGradient(weight_VH, work) if needs_weight else None
        grad_bias = BiasGradient(bias_V, work) if bias_V is not None and needs_bias else None
        needs_gradient = needs_hidden or needs_weight or needs_bias
        sweep = _Sweep(work, labels, overlap=options.overlap, with_gradient=needs_gradient)
        for chunk in work.chunks(labels.rows):
            sweep(chunk)
            if grad_hidden_MH is not None:
                torch.mm(chunk.logits_NV, work.weight_VH, out=grad_hidden_MH[chunk.place])
            if grad_weight is not None:
                grad_weight.add(chunk.logits_NV, hidden_MH[chunk.place])
            if grad_bias is not None:
                grad_bias.add(chunk.logits_NV)
        ctx.save_for_backward(
            grad_hidden_MH,
            None if grad_weight is None else grad_weight.sum_VH,
            None if grad_bias is None else grad_bias.sum_V,
        )
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_MH, weight_VH, bias_V)]
        outputs = (
            *(sweep.soft_M, sweep.hard_M, sweep.argmax_M, sweep.entropy_M),
            *(sweep.soft_weight_M, sweep.hard_weight_M),
            *(sweep.student_MC, sweep.topk_overlap_M),
        )
        ctx.mark_non_differentiable(*(output for output in outputs if output is not None))
        return sweep.total(), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if gradient is None else scaled(gradient, grad_total, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None


class _Sweep:
    """Collects the terms of every row; leaves the gradient where the logits were."""

    def __init__(
        self, work: HeadChunks, labels: _Labels, *, overlap: bool, with_gradient: bool
    ) -> None:
        num_rows = len(labels.rows)
        self._work = work
        self._labels = labels
        self._with_gradient = with_gradient
        self.soft_M = work.new_empty(num_rows)
        self.hard_M = work.new_empty(num_rows)
        self.argmax_M = torch.empty_like(labels.rows.hard_M)
        has_entropy = labels.entropy_weight_M is not None
        self.entropy_M = work.new_empty(num_rows) if has_entropy else None
        self.soft_weight_M = work.new_empty(num_rows)
        self.hard_weight_M = work.new_empty(num_rows)
        self.student_MC = work.new_empty(num_rows, labels.rows.topk_ids_MK.shape[1] + 1)
        self.topk_overlap_M = work.new_empty(num_rows) if overlap else None

    def __call__(self, chunk: Block) -> None:
        soft, dtype = self._labels.soft, self._work.dtype
        teacher_NC = None if soft is None else soft.teacher_categories(chunk.rows, dtype)
        for block in self._work.blocks(chunk):
            place = block.place
            inside = slice(place.start - chunk.start, place.stop - chunk.start)
            terms, gradient = row_terms(
                self._work.kernel.reduce(block.logits_NV, block.rows),
                block.rows,
                None if teacher_NC is None else teacher_NC[inside],
                soft,
                partial(self._weigh, block),
            )
            self.soft_M[place] = terms.soft_N
            self.hard_M[place] = terms.hard_N
            self.argmax_M[place] = terms.argmax_N
            self.student_MC[place] = terms.student_NC
            if self.entropy_M is not None and terms.entropy_N is not None:
                self.entropy_M[place] = terms.entropy_N
            if self.topk_overlap_M is not None and terms.overlap_N is not None:
                self.topk_overlap_M[place] = terms.overlap_N
            if self._with_gradient:
                self._work.kernel.write_gradient(block.logits_NV, gradient)

    def _weigh(self, block: Block, student_logprob_N1: Tensor) -> RowWeights:
        """Ask for the weights of a block, and remember them."""
        place, labels = block.place, self._labels
        soft_N, hard_N = labels.weights(block.rows, place, student_logprob_N1.squeeze(-1))
        self.soft_weight_M[place], self.hard_weight_M[place] = soft_N, hard_N
        entropy_N1 = None
        if labels.entropy_weight_M is not None:
            entropy_N1 = labels.entropy_weight_M[place].to(self._work.dtype).unsqueeze(-1)
        return RowWeights(
            self.soft_weight_M[place].unsqueeze(-1),
            self.hard_weight_M[place].unsqueeze(-1),
            entropy_N1,
        )

    def total(self) -> Tensor:
        """The weighted sum of all terms."""
        terms_M = self.soft_weight_M * self.soft_M + self.hard_weight_M * self.hard_M
        if self.entropy_M is not None and self._labels.entropy_weight_M is not None:
            terms_M -= self._labels.entropy_weight_M * self.entropy_M
        return terms_M.sum()


def _scaled(hidden_MH: Tensor, head: LinearHead) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias of the same logits with a scale of one."""
    if head.scale == 1.0:
        return hidden_MH, head.weight_VH, head.bias_V
    bias_V = None if head.bias_V is None else head.bias_V * head.scale
    return hidden_MH * head.scale, head.weight_VH, bias_V


def _with_an_entry(rows: TeacherRows) -> TeacherRows:
    """Rows that store nothing at all get one unused entry, so that no axis is empty."""
    if rows.topk_ids_MK.shape[1] > 0:
        return rows
    return replace(
        rows,
        topk_ids_MK=rows.topk_ids_MK.new_full((len(rows), 1), PADDING_ID),
        topk_logprobs_MK=rows.topk_logprobs_MK.new_full((len(rows), 1), NEG_INF),
    )


def _check_finite(**terms: Tensor | None) -> None:
    known = {name: term_M for name, term_M in terms.items() if term_M is not None}
    finite_M = torch.stack([torch.isfinite(term_M) for term_M in known.values()]).all(dim=0)
    if bool(finite_M.all()):
        return
    found = (~finite_M).nonzero().flatten()[:8].tolist()
    values = ", ".join(f"{name} {term_M[found].tolist()}" for name, term_M in known.items())
    raise NonFiniteLossError(
        f"the loss of rows {found} of {len(finite_M)} is not finite ({values}); "
        "lower the learning rate or check the student's weights"
    )
