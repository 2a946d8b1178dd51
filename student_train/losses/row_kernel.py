"""The two sweeps over a block of logits, with torch operations; runs on every device.

A sweep reduces every row to a few numbers (``reduce``), a second one replaces the logits by their
gradient (``write_gradient``). What lies between is in ``row_terms.py``. All arrays of the block's
size are made once and used again: on CPU fresh memory costs as much as the arithmetic.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from student_train.losses.base import NEG_INF, PADDING_ID, TeacherRows
from student_train.losses.row_terms import RowGradient, RowReductions

LOWEST_GAP = -1e4
"""Below this a logit is so far under the largest that its probability is 0 in every dtype."""

ARGMAX_WIDTH = 128
"""Columns of a piece in :func:`row_max`."""


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """What the sweeps have to compute."""

    vocab_size: int
    softcap: float | None = None
    temperature: float = 1.0
    """Of the soft term; at 1 it shares the softmax of the hard term."""
    entropy: bool = False
    """Whether the student's entropy is asked for."""
    sampled: bool = False
    """Whether the logits at ``tail_ids_MS`` are asked for."""
    overlap: bool = False
    """Whether the largest logits of the tail are asked for, as many as there are stored tokens."""


class RowKernel(Protocol):
    """Both sweeps over a block of logits. ``write_gradient`` follows ``reduce`` of its block."""

    def reduce(self, logits_NV: Tensor, rows: TeacherRows) -> RowReductions:
        """Numbers of every row, in the kernel's dtype.

        Args:
            logits_NV: float[N, V], scaled but not yet capped. Its content may be lost.
            rows: Labels of these rows; ids are distinct, K is at least 1.
        """

    def write_gradient(self, logits_NV: Tensor, gradient: RowGradient) -> None:
        """Replace the logits by the gradient of the loss with respect to them."""


class TorchRowKernel:
    """Both sweeps with torch operations, in place.

    Args:
        options: What to compute.
        max_rows: Rows of the largest block.
        logits_dtype: Dtype of the logits; where it differs from ``dtype`` a block is copied.
        dtype: float32 or float64.
        device: Where the blocks are.
    """

    def __init__(
        self,
        options: KernelOptions,
        *,
        max_rows: int,
        logits_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._options = options

        def workspace(needed: bool) -> Tensor | None:
            shape = (max_rows, options.vocab_size)
            return torch.empty(shape, dtype=dtype, device=device) if needed else None

        self._tail = workspace(logits_dtype != dtype)
        self._soft_tail = workspace(options.temperature != 1.0)
        self._gap = workspace(options.entropy)
        self._slope = workspace(options.softcap is not None)

    def reduce(self, logits_NV: Tensor, rows: TeacherRows) -> RowReductions:
        """See :class:`RowKernel`."""
        num_rows = logits_NV.shape[0]
        tail_NV = logits_NV if self._tail is None else self._tail[:num_rows].copy_(logits_NV)
        self._cap(tail_NV)
        self._rows, self._places_NK = rows, places_of(rows.topk_ids_MK)
        unused_NK = rows.topk_ids_MK == PADDING_ID
        stored_NK = tail_NV.gather(-1, self._places_NK).masked_fill(unused_NK, NEG_INF)
        hard_N1 = tail_NV.gather(-1, rows.hard_M.unsqueeze(-1))
        sampled_NS = None
        if self._options.sampled:
            assert rows.tail_ids_MS is not None
            sampled_NS = tail_NV.gather(-1, rows.tail_ids_MS.clamp_min(0))
        hide_stored(tail_NV, self._places_NK, unused_NK)
        tail_best_NK = best_of(tail_NV, stored_NK) if self._options.overlap else None
        top_N1, argmax_N1 = row_max(tail_NV)
        # distinct tokens leave nothing over only if they are as many as the vocabulary
        can_be_empty = rows.topk_ids_MK.shape[-1] >= self._options.vocab_size
        empty_N1 = top_N1 == NEG_INF if can_be_empty else None
        soft_log_sum_N1 = tail_gap_N1 = None
        if self._soft_tail is not None:
            temperature = self._options.temperature
            soft_NV = torch.div(tail_NV, temperature, out=self._soft_tail[:num_rows])
            soft_log_sum_N1 = _softmax(soft_NV, argmax_N1, empty_N1)
        if self._gap is not None:
            finite_N1 = top_N1.clamp_min(torch.finfo(top_N1.dtype).min)
            gap_NV = torch.sub(tail_NV, finite_N1, out=self._gap[:num_rows])
            gap_NV.clamp_(min=LOWEST_GAP)  # 0 * -inf at the stored tokens would be NaN
        log_sum_N1 = _softmax(tail_NV, argmax_N1, empty_N1)
        if self._gap is not None:
            gap_NV = self._gap[:num_rows]
            tail_gap_N1 = torch.bmm(tail_NV.unsqueeze(1), gap_NV.unsqueeze(2)).squeeze(-1)
        return RowReductions(
            stored_NK=stored_NK,
            hard_N1=hard_N1,
            sampled_NS=sampled_NS,
            tail_max_N1=top_N1,
            tail_argmax_N1=argmax_N1,
            tail_log_sum_N1=log_sum_N1,
            soft_tail_log_sum_N1=log_sum_N1 if soft_log_sum_N1 is None else soft_log_sum_N1,
            tail_gap_N1=tail_gap_N1,
            tail_best_NK=tail_best_NK,
        )

    def write_gradient(self, logits_NV: Tensor, gradient: RowGradient) -> None:
        """See :class:`RowKernel`."""
        num_rows = logits_NV.shape[0]
        tail_NV = logits_NV if self._tail is None else self._tail[:num_rows]
        if gradient.gap_N1 is None:
            tail_NV.mul_(gradient.tail_N1)
        else:
            assert self._gap is not None
            gap_NV = self._gap[:num_rows].mul_(gradient.gap_N1).add_(gradient.tail_N1)
            tail_NV.mul_(gap_NV)
        if gradient.soft_tail_N1 is not None:
            assert self._soft_tail is not None
            tail_NV.add_(self._soft_tail[:num_rows].mul_(gradient.soft_tail_N1))
        tail_NV.scatter_add_(-1, self._places_NK, gradient.stored_NK)
        tail_NV.scatter_add_(-1, self._rows.hard_M.unsqueeze(-1), gradient.hard_N1)
        if gradient.sampled_NS is not None:
            assert self._rows.tail_ids_MS is not None
            places_NS = self._rows.tail_ids_MS.clamp_min(0)
            tail_NV.scatter_add_(-1, places_NS, gradient.sampled_NS)
        if self._slope is not None:
            tail_NV.mul_(self._slope[:num_rows])
        if tail_NV is not logits_NV:
            logits_NV.copy_(tail_NV)

    def _cap(self, logits_NV: Tensor) -> None:
        """Squeeze the logits, and keep the slope 1 - tanh^2."""
        if self._options.softcap is None:
            return
        assert self._slope is not None
        logits_NV.div_(self._options.softcap).tanh_()
        slope_NV = self._slope[: logits_NV.shape[0]]
        torch.mul(logits_NV, logits_NV, out=slope_NV).neg_().add_(1.0)
        logits_NV.mul_(self._options.softcap)


def hide_stored(logits_NV: Tensor, places_NK: Tensor, unused_NK: Tensor) -> None:
    """Replace the logits of the stored tokens by -inf."""
    first_N1 = logits_NV[:, :1].clone()
    logits_NV.scatter_(-1, places_NK, NEG_INF)
    # a row that stores nothing has all its places at token 0, which stays in the tail
    empty_N1 = unused_NK.all(dim=-1, keepdim=True)
    logits_NV[:, :1] = torch.where(empty_N1, first_N1, logits_NV[:, :1])


def best_of(tail_NV: Tensor, stored_NK: Tensor) -> Tensor:
    """The largest logits of the tail, as many as there are entries for stored tokens."""
    return tail_NV.topk(min(stored_NK.shape[-1], tail_NV.shape[-1]), dim=-1).values


def places_of(topk_ids_NK: Tensor) -> Tensor:
    """A column for every entry: unused ones share that of the row's first used one, or are 0."""
    used_NK = topk_ids_NK != PADDING_ID
    first_N1 = topk_ids_NK.gather(-1, used_NK.int().argmax(dim=-1, keepdim=True))
    return torch.where(used_NK, topk_ids_NK, first_N1).clamp_min(0)


def _softmax(logits_NV: Tensor, argmax_N1: Tensor, empty_N1: Tensor | None) -> Tensor:
    """Softmax of every row in place; returns the log of the sum of exp(z - max z), [N, 1].

    A row of nothing but -inf becomes 0, and so does its sum's log; None says there is none.
    """
    torch.softmax(logits_NV, dim=-1, out=logits_NV)  # a row is read before it is written
    # the largest probability is 1 / sum exp(z - max)
    log_sum_N1 = -logits_NV.gather(-1, argmax_N1).log()
    if empty_N1 is None:
        return log_sum_N1
    logits_NV.masked_fill_(empty_N1, 0.0)
    return log_sum_N1.masked_fill(empty_N1, 0.0)


def row_max(values_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of every row and its place, [N, 1] each.

    Finding a place costs ten times what finding a value does, so values are compared in pieces of
    ARGMAX_WIDTH first, and only the best piece is searched.
    """
    pieces, rest = divmod(values_NV.shape[-1], ARGMAX_WIDTH)
    if pieces == 0:
        return values_NV.max(dim=-1, keepdim=True)
    whole = pieces * ARGMAX_WIDTH
    pieces_NPW = values_NV[:, :whole].view(-1, pieces, ARGMAX_WIDTH)
    piece_N1 = pieces_NPW.amax(dim=-1).argmax(dim=-1, keepdim=True)
    best_N1W = pieces_NPW.gather(1, piece_N1.unsqueeze(-1).expand(-1, 1, ARGMAX_WIDTH))
    top_N1, place_N1 = best_N1W.squeeze(1).max(dim=-1, keepdim=True)
    place_N1 = place_N1 + piece_N1 * ARGMAX_WIDTH
    if rest:
        rest_top_N1, rest_place_N1 = values_NV[:, whole:].max(dim=-1, keepdim=True)
        place_N1 = torch.where(rest_top_N1 > top_N1, rest_place_N1 + whole, place_N1)
        top_N1 = torch.maximum(top_N1, rest_top_N1)
    return top_N1, place_N1
