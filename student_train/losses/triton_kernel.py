"""The two sweeps over a block of logits as Triton programs, for GPUs.

The arithmetic of :class:`student_train.losses.row_kernel.TorchRowKernel`, with each sweep in one
program: logits are read twice and written once, nothing else of their size exists. What is
gathered and scattered at the stored tokens is [N, K] and stays in torch.

Runs on CPU through Triton's interpreter (``TRITON_INTERPRET=1`` before triton is first imported),
which is how it is tested where there is no GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from student_train.losses.base import NEG_INF, PADDING_ID, TeacherRows
from student_train.losses.row_kernel import KernelOptions, best_of, hide_stored, places_of
from student_train.losses.row_terms import RowGradient, RowReductions

TILE = 4096
"""Tokens of a tile: long enough for loads of full width, short enough for the registers."""

NUM_WARPS = 8


class TritonRowKernel:
    """Both sweeps as Triton programs; methods as of ``RowKernel``.

    Args:
        options: What to compute.
        dtype: float32 or float64.
    """

    def __init__(self, options: KernelOptions, *, dtype: torch.dtype) -> None:
        self._options = options
        self._dtype = dtype
        self._settings = {
            "SOFTCAP": options.softcap or 0.0,
            "SOFT": options.temperature != 1.0,
            "ENTROPY": options.entropy,
            "TILE": min(TILE, triton.next_power_of_2(options.vocab_size)),
            "num_warps": NUM_WARPS,
        }

    def reduce(self, logits_NV: Tensor, rows: TeacherRows) -> RowReductions:
        """See ``RowKernel``."""
        unused_NK = rows.topk_ids_MK == PADDING_ID
        self._rows, self._places_NK = rows, places_of(rows.topk_ids_MK)
        stored_NK = self._at(logits_NV, self._places_NK)
        hard_N1 = self._at(logits_NV, rows.hard_M.unsqueeze(-1))
        sampled_NS = None
        if self._options.sampled:
            assert rows.tail_ids_MS is not None
            sampled_NS = self._at(logits_NV, rows.tail_ids_MS.clamp_min(0))
        hide_stored(logits_NV, self._places_NK, unused_NK)
        tail_best_NK = None
        if self._options.overlap:
            best_NK = best_of(logits_NV, stored_NK).to(self._dtype)
            tail_best_NK = torch.where(torch.isneginf(best_NK), NEG_INF, self._capped(best_NK))
        top_N1, log_sum_N1, soft_log_sum_N1, gap_N1 = (torch.empty_like(hard_N1) for _ in range(4))
        argmax_N1 = torch.empty_like(rows.hard_M).unsqueeze(-1)
        _reduce_row[(len(rows),)](
            logits_NV,
            logits_NV.stride(0),
            logits_NV.shape[1],
            top_N1,
            argmax_N1,
            log_sum_N1,
            soft_log_sum_N1,
            gap_N1,
            self._temperature(hard_N1),
            **self._settings,
        )
        self._found = RowReductions(
            stored_NK=stored_NK.masked_fill(unused_NK, NEG_INF),
            hard_N1=hard_N1,
            sampled_NS=sampled_NS,
            tail_max_N1=top_N1,
            tail_argmax_N1=argmax_N1,
            tail_log_sum_N1=log_sum_N1,
            soft_tail_log_sum_N1=soft_log_sum_N1,
            tail_gap_N1=gap_N1 if self._options.entropy else None,
            tail_best_NK=tail_best_NK,
        )
        return self._found

    def write_gradient(self, logits_NV: Tensor, gradient: RowGradient) -> None:
        """See ``RowKernel``."""
        rows, found = self._rows, self._found
        # a hard label among the stored tokens is added there, in float32; else in the sweep
        is_hard_NK = rows.topk_ids_MK == rows.hard_M.unsqueeze(-1)
        stored_NK = gradient.stored_NK + is_hard_NK * gradient.hard_N1
        hard_N1 = torch.where(is_hard_NK.any(dim=-1, keepdim=True), 0.0, gradient.hard_N1)
        nothing = gradient.tail_N1
        num_tiles = triton.cdiv(logits_NV.shape[1], self._settings["TILE"])
        _write_row[(len(rows), num_tiles)](
            logits_NV,
            logits_NV.stride(0),
            logits_NV.shape[1],
            found.tail_max_N1,
            found.tail_log_sum_N1,
            found.soft_tail_log_sum_N1,
            gradient.tail_N1.contiguous(),
            nothing if gradient.gap_N1 is None else gradient.gap_N1.contiguous(),
            nothing if gradient.soft_tail_N1 is None else gradient.soft_tail_N1.contiguous(),
            rows.hard_M.contiguous(),
            hard_N1.contiguous(),
            self._temperature(hard_N1),
            **self._settings,
        )
        self._add(logits_NV, self._places_NK, stored_NK, found.stored_NK)
        if gradient.sampled_NS is not None:
            assert rows.tail_ids_MS is not None
            assert found.sampled_NS is not None
            places_NS = rows.tail_ids_MS.clamp_min(0)
            self._add(logits_NV, places_NS, gradient.sampled_NS, found.sampled_NS)

    def _temperature(self, like: Tensor) -> Tensor:
        """As an array: a number would be rounded to float32, and a constant compiled in."""
        return like.new_full((1,), self._options.temperature)

    def _at(self, logits_NV: Tensor, places_NP: Tensor) -> Tensor:
        """Capped logits at some places."""
        return self._capped(logits_NV.gather(-1, places_NP).to(self._dtype))

    def _capped(self, logits_NP: Tensor) -> Tensor:
        """Squeezed logits."""
        if self._options.softcap is None:
            return logits_NP
        return self._options.softcap * torch.tanh(logits_NP / self._options.softcap)

    def _add(
        self, logits_NV: Tensor, places_NP: Tensor, gradient_NP: Tensor, capped_NP: Tensor
    ) -> None:
        """Add derivatives by capped logits, as derivatives by the logits themselves."""
        if self._options.softcap is not None:
            gradient_NP = gradient_NP * (1 - (capped_NP / self._options.softcap) ** 2)
            gradient_NP = torch.where(torch.isneginf(capped_NP), 0.0, gradient_NP)
        logits_NV.scatter_add_(-1, places_NP, gradient_NP.to(logits_NV.dtype))


@triton.jit  # type: ignore[untyped-decorator]
def _capped(logits, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Squeeze logits; tanh(x) is 2 sigmoid(2x) - 1."""
    if SOFTCAP > 0.0:
        logits = SOFTCAP * (2.0 * tl.sigmoid(2.0 * logits / SOFTCAP) - 1.0)
    return logits


@triton.jit  # type: ignore[untyped-decorator]
def _reduce_row(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    vocab_size,
    top,
    argmax,
    log_sum,
    soft_log_sum,
    gap,
    temperature,
    SOFTCAP: tl.constexpr,
    SOFT: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: maximum, its place, sums and mean gap, in one pass.

    Sums are relative to the largest logit so far, and rescaled when a larger one comes.
    """
    row = tl.program_id(0).to(tl.int64)
    wide = top.dtype.element_ty
    top_so_far = tl.full((), float("-inf"), wide)
    place = tl.full((), 0, tl.int64)
    total = tl.full((), 0.0, wide)
    soft_total = tl.full((), 0.0, wide)
    gap_total = tl.full((), 0.0, wide)
    for start in range(0, vocab_size, TILE):
        tokens = start + tl.arange(0, TILE)
        inside = tokens < vocab_size
        z = tl.load(logits + row * row_stride + tokens, mask=inside, other=float("-inf")).to(wide)
        hidden = z == float("-inf")
        z = tl.where(hidden, float("-inf"), _capped(z, SOFTCAP))
        tile_top = tl.max(z, axis=0)
        if tile_top > top_so_far:
            place = (start + tl.argmax(z, axis=0)).to(tl.int64)
        # NaN must not be lost: it compares as not larger
        new_top = tl.where(tile_top > top_so_far, tile_top, top_so_far)
        # before any finite logit there is nothing to shift by, and nothing to rescale
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        step = tl.where(top_so_far == float("-inf"), shift, top_so_far) - shift
        distance = z - shift
        weight = tl.exp(distance)
        if ENTROPY:
            rescaled = tl.exp(step) * (gap_total + step * total)
            finite = tl.where(weight > 0, distance, 0.0)  # 0 * -inf would be NaN
            gap_total = rescaled + tl.sum(weight * finite, axis=0)
        if SOFT:
            softer = tl.sum(tl.exp(distance / tl.load(temperature)), axis=0)
            soft_total = tl.exp(step / tl.load(temperature)) * soft_total + softer
        total = tl.exp(step) * total + tl.sum(weight, axis=0)
        top_so_far = new_top
    tl.store(top + row, top_so_far)
    tl.store(argmax + row, place)
    # without a tail the sum is 0; where it is NaN it stays so
    tl.store(log_sum + row, tl.log(tl.where(total == 0, 1.0, total)))
    if SOFT:
        tl.store(soft_log_sum + row, tl.log(tl.where(soft_total == 0, 1.0, soft_total)))
    if ENTROPY:
        tl.store(gap + row, gap_total / tl.where(total == 0, 1.0, total))


@triton.jit  # type: ignore[untyped-decorator]
def _write_row(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    vocab_size,
    top,
    log_sum,
    soft_log_sum,
    tail,
    gap,
    soft_tail,
    hard,
    hard_gradient,
    temperature,
    SOFTCAP: tl.constexpr,
    SOFT: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row and tile: the gradient of the tail and of a hard label in it."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = tokens < vocab_size
    wide = top.dtype.element_ty
    places = logits + row * row_stride + tokens
    z = tl.load(places, mask=inside, other=float("-inf")).to(wide)
    hidden = z == float("-inf")
    # a row without a tail has nothing but hidden tokens: any finite numbers do
    largest = tl.load(top + row)
    largest = tl.where(largest > float("-inf"), largest, 0.0)
    z = tl.where(hidden, largest, _capped(z, SOFTCAP))
    q = tl.exp(z - largest - tl.load(log_sum + row))
    factor = tl.load(tail + row)
    if ENTROPY:
        factor += tl.load(gap + row) * (z - largest)
    gradient = q * factor
    if SOFT:
        soft_q = tl.exp((z - largest) / tl.load(temperature) - tl.load(soft_log_sum + row))
        gradient += soft_q * tl.load(soft_tail + row)
    gradient = tl.where(hidden, 0.0, gradient)
    gradient += tl.where(tokens == tl.load(hard + row), tl.load(hard_gradient + row), 0.0)
    if SOFTCAP > 0.0:
        squeezed = z / SOFTCAP
        gradient *= 1.0 - squeezed * squeezed
    tl.store(places, gradient.to(logits.dtype.element_ty), mask=inside)
