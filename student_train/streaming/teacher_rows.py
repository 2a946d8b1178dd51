"""From cached samples to the rows that losses read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.columns import LOG_POWER_SUM, POWER_SLOPE, POWERS, TAIL_IDS, TAIL_WEIGHTS
from storage.keys import CountsSpec, LabelSetSpec
from storage.label_batch import LabelBatch, SampleRanges, ranges_of
from storage.samples import LabelledSample
from storage.tail import LOG_ZERO
from student_train.hard.config import HardLabel
from student_train.hard.labels import hard_labels
from student_train.losses.base import PADDING_ID, TeacherRows

SIDECAR = "sidecar"
"""Name under which the reader attaches the column of a sidecar to a sample."""


def teacher_rows(
    samples: Sequence[LabelledSample] | SampleRanges, hard: HardLabel, spec: LabelSetSpec
) -> TeacherRows:
    """The labels of all labelled positions, sample after sample, with the chosen hard label.

    Every column is copied once, from where the samples lie to where the loss reads it.

    Args:
        samples: At least one, all with the same optional columns.
        hard: Which token is the hard label.
        spec: Of the samples' label set.
    """
    found = samples if isinstance(samples, SampleRanges) else ranges_of(samples)
    batches, copy = found.batches, found.rows.copy
    log_tail_M = copy([batch.log_tail_mass_N for batch in batches], np.float32)
    # the stored form of "no tail": as a mass it would be infinitely surprising to a student without
    log_tail_M[log_tail_M <= LOG_ZERO] = -np.inf
    return TeacherRows(
        hard_M=torch.from_numpy(hard_labels(found, hard, vocab_size=spec.vocab_size)),
        topk_ids_MK=torch.from_numpy(copy([b.topk_ids_NK for b in batches], np.int64)),
        topk_logprobs_MK=_copied(found, lambda batch: batch.topk_logprobs_NK),
        log_tail_mass_M=torch.from_numpy(log_tail_M),
        token_logprob_M=_copied(found, lambda batch: batch.token_logprob_N),
        entropy_M=_column(found, "entropy"),
        log_power_sums=_powers(found, LOG_POWER_SUM),
        power_slopes=_powers(found, POWER_SLOPE),
        tail_ids_MS=_rectangle(found, TAIL_IDS, PADDING_ID, np.int64),
        tail_weights_MS=_rectangle(found, TAIL_WEIGHTS, 0.0, np.float32),
        samples_cover_all=isinstance(spec.tail_samples, CountsSpec),
        sidecar_M=_column(found, SIDECAR),
        document_M=torch.from_numpy(np.repeat(np.arange(len(found)), found.rows.length_S)),
    )


def _copied(found: SampleRanges, column: Callable[[LabelBatch], npt.NDArray[Any]]) -> Tensor:
    """A column of all rows, float32."""
    return torch.from_numpy(found.rows.copy([column(b) for b in found.batches], np.float32))


def _column(found: SampleRanges, name: str) -> Tensor | None:
    """An optional scalar column of all rows, float32[M]."""
    if name not in found.batches[0].optional:
        return None
    return _copied(found, lambda batch: batch.optional[name])


def _powers(found: SampleRanges, prefix: str) -> dict[str, Tensor]:
    """The stored columns of power sums, or of their slopes, by the name of the exponent."""
    columns = {power: _column(found, prefix + power) for power in POWERS}
    return {power: column for power, column in columns.items() if column is not None}


def _rectangle(
    found: SampleRanges, name: str, unused: float, dtype: type[np.number[Any]]
) -> Tensor | None:
    """Tail samples of all rows, [M, S], as wide as the widest sample."""
    if name not in found.batches[0].optional:
        return None
    parts = [batch.optional[name] for batch in found.batches]
    widest = max(part.shape[1] for part in parts)
    padded = [
        np.pad(part, ((0, 0), (0, widest - part.shape[1])), constant_values=unused)
        for part in parts
    ]
    return torch.from_numpy(found.rows.copy(padded, dtype)[:, : _tail_width(found)].copy())


def _tail_width(found: SampleRanges) -> int:
    """Most tail samples of a row of any of the samples, rows that are left out included."""
    whole = replace(found, num_rows_S=None).rows
    counts_M = whole.copy(
        [(batch.optional[TAIL_IDS] != PADDING_ID).sum(axis=1) for batch in found.batches], np.int64
    )
    return int(counts_M.max(initial=0))
