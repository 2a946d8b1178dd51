"""Gradients of the output embedding and its bias, summed over chunks of rows in float32."""

import torch
from torch import Tensor

from student_train.losses.head_chunks import HeadChunks

TILE_ROWS = 4096
"""Vocabulary rows of one product. A product in bfloat16 is added to the float32 sum through two
buffers of this size: adding different dtypes at once takes torch's slow path on CPU, and a buffer
of the whole embedding would be half as large as the sum itself."""


class WeightGradient:
    """Sum over chunks of ``grad_logits.T @ hidden``.

    Args:
        weight_VH: The whole weight; rows beyond the effective vocabulary get gradient 0.
        work: Says how many chunks will be added. For one the product itself is the sum: it
            accumulates in float32 inside.
    """

    def __init__(self, weight_VH: Tensor, work: HeadChunks) -> None:
        self._vocab_size = vocab_size = work.vocab_size
        dtype, num_chunks = work.dtype, work.num_chunks
        self._in_tiles = num_chunks > 1 and weight_VH.dtype != dtype
        sum_dtype = dtype if self._in_tiles else weight_VH.dtype
        self.sum_VH = torch.empty(weight_VH.shape, dtype=sum_dtype, device=weight_VH.device)
        """float[V, H]; complete after the last chunk."""
        self.sum_VH[vocab_size if num_chunks else 0 :].zero_()
        self._started = False
        if self._in_tiles:
            tile = (min(TILE_ROWS, vocab_size), weight_VH.shape[1])
            self._product = torch.empty(tile, dtype=weight_VH.dtype, device=weight_VH.device)
            self._wide = torch.empty(tile, dtype=dtype, device=weight_VH.device)

    def add(self, grad_logits_NV: Tensor, hidden_NH: Tensor) -> None:
        """Add a chunk."""
        live_VH = self.sum_VH[: self._vocab_size]
        if self._in_tiles:
            self._add_in_tiles(grad_logits_NV, hidden_NH)
        elif self._started:
            live_VH.addmm_(grad_logits_NV.t(), hidden_NH)
        else:
            torch.mm(grad_logits_NV.t(), hidden_NH, out=live_VH)
        self._started = True

    def _add_in_tiles(self, grad_logits_NV: Tensor, hidden_NH: Tensor) -> None:
        for start in range(0, self._vocab_size, TILE_ROWS):
            stop = min(start + TILE_ROWS, self._vocab_size)
            product = self._product[: stop - start]
            torch.mm(grad_logits_NV[:, start:stop].t(), hidden_NH, out=product)
            if self._started:
                self.sum_VH[start:stop].add_(self._wide[: stop - start].copy_(product))
            else:
                self.sum_VH[start:stop].copy_(product)


class BiasGradient:
    """Sum over rows of ``grad_logits``.

    Args:
        bias_V: The whole bias; entries beyond the effective vocabulary get gradient 0.
        work: Says in which dtype is summed.
    """

    def __init__(self, bias_V: Tensor, work: HeadChunks) -> None:
        self._vocab_size = work.vocab_size
        self.sum_V = torch.zeros(bias_V.shape, dtype=work.dtype, device=bias_V.device)
        """float[V]; complete after the last chunk."""

    def add(self, grad_logits_NV: Tensor) -> None:
        """Add a chunk."""
        self.sum_V[: self._vocab_size] += grad_logits_NV.sum(dim=0, dtype=self.sum_V.dtype)


def scaled(sum_: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor * sum_`` in another dtype, rounded once; to be called while going backward.

    The sum is lost where nobody can ask for it again: a second array of the embedding's size would
    be the peak of the whole pass.
    """
    if sum_.dtype == dtype:
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return sum_ * factor.to(dtype)
        return sum_.mul_(factor.to(dtype))
    out = torch.empty(sum_.shape, dtype=dtype, device=sum_.device)
    for start in range(0, len(sum_), TILE_ROWS):
        part = slice(start, start + TILE_ROWS)
        torch.mul(sum_[part], factor.to(sum_.dtype), out=out[part])
    return out
