"""Logits in chunks of rows: one buffer that every chunk's matrix product is written to."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.losses.base import TeacherRows
from student_train.losses.row_kernel import KernelOptions, RowKernel, TorchRowKernel

CHUNK_ROWS = 512
"""Rows of one matrix product. Measured on CPU: below 256 the products are too thin to be fast,
above 512 only memory grows."""

BLOCK_BYTES = 16 * 2**20
"""Logits that are swept at once on CPU, in the kernel's dtype: what a cache holds. Devices other
than CPU sweep a chunk at once."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows: of a chunk, as many as one matrix product takes, or of one sweep."""

    start: int
    """First row, counted in the whole micro-batch."""
    logits_NV: Tensor
    rows: TeacherRows
    """Their labels."""

    @property
    def place(self) -> slice:
        """Where the rows are in the micro-batch."""
        return slice(self.start, self.start + len(self.rows))


class HeadChunks:
    """Computes the logits of a micro-batch chunk by chunk.

    Args:
        hidden_MH: float[M, H], already scaled.
        weight_VH: float[V, H].
        bias_V: float[V], already scaled, or None.
        options: What the kernel has to compute; its vocabulary is the effective one.
    """

    def __init__(
        self, hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, options: KernelOptions
    ) -> None:
        self.vocab_size = options.vocab_size
        self.hidden_MH = hidden_MH
        self.weight_VH = weight_VH[: self.vocab_size]
        self._bias_V = None if bias_V is None else bias_V[: self.vocab_size]
        self.dtype = torch.float64 if hidden_MH.dtype == torch.float64 else torch.float32
        num_rows = len(hidden_MH)
        chunk_rows = min(CHUNK_ROWS, num_rows)
        self.num_chunks = -(-num_rows // CHUNK_ROWS)
        self._logits_NV = hidden_MH.new_empty(chunk_rows, self.vocab_size)
        self._block_rows = chunk_rows
        if hidden_MH.device.type == "cpu":
            row_bytes = self.vocab_size * self.dtype.itemsize
            self._block_rows = max(1, min(chunk_rows, BLOCK_BYTES // row_bytes))
        self.kernel = _make_kernel(options, hidden_MH, self.dtype, self._block_rows)

    def new_empty(self, *shape: int) -> Tensor:
        """Memory of the kernel's dtype where the hidden states are."""
        return self.hidden_MH.new_empty(shape, dtype=self.dtype)

    def chunks(self, rows: TeacherRows) -> Iterator[Block]:
        """Logits of every chunk; each overwrites the one before."""
        for start in range(0, len(rows), CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, len(rows))
            hidden_NH = self.hidden_MH[start:stop]
            logits_NV = self._logits_NV[: stop - start]
            if self._bias_V is None:
                torch.mm(hidden_NH, self.weight_VH.t(), out=logits_NV)
            else:
                torch.addmm(self._bias_V, hidden_NH, self.weight_VH.t(), out=logits_NV)
            yield Block(start, logits_NV, rows.rows(start, stop).distinct())

    def blocks(self, chunk: Block) -> Iterator[Block]:
        """The chunk in pieces that a kernel sweeps at once."""
        for start in range(0, len(chunk.rows), self._block_rows):
            stop = min(start + self._block_rows, len(chunk.rows))
            yield Block(
                chunk.start + start, chunk.logits_NV[start:stop], chunk.rows.rows(start, stop)
            )


def _make_kernel(
    options: KernelOptions, hidden_MH: Tensor, dtype: torch.dtype, max_rows: int
) -> RowKernel:
    """Triton's where it can run, else that of torch."""
    if hidden_MH.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from student_train.losses.triton_kernel import TritonRowKernel

        return TritonRowKernel(options, dtype=dtype)
    return TorchRowKernel(
        options,
        max_rows=max_rows,
        logits_dtype=hidden_MH.dtype,
        dtype=dtype,
        device=hidden_MH.device,
    )
