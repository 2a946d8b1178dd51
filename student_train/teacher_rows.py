"""From cached samples to the rows that losses read."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.columns import LOG_POWER_SUM, POWER_SLOPE, POWERS, TAIL_IDS, TAIL_WEIGHTS
from storage.keys import CountsSpec, LabelSetSpec
from storage.samples import LabelledSample
from storage.tail import LOG_ZERO
from student_train.hard.config import HardLabel
from student_train.hard.labels import hard_labels
from student_train.losses.base import PADDING_ID, TeacherRows

SIDECAR = "sidecar"
"""Name under which the reader attaches the column of a sidecar to a sample."""


def teacher_rows(
    samples: Sequence[LabelledSample], hard: HardLabel, spec: LabelSetSpec
) -> TeacherRows:
    """The labels of all labelled positions, sample after sample, with the chosen hard label.

    Args:
        samples: At least one, all with the same optional columns.
        hard: Which token is the hard label.
        spec: Of the samples' label set.
    """
    hard_N = [hard_labels(sample, hard, vocab_size=spec.vocab_size) for sample in samples]
    lengths = [len(sample.positions_N) for sample in samples]
    log_tail_N = np.concatenate([s.log_tail_mass_N for s in samples])
    # the stored form of "no tail": as a mass it would be infinitely surprising to a student without
    log_tail_N = np.where(log_tail_N <= LOG_ZERO, np.float32(-np.inf), log_tail_N)
    return TeacherRows(
        hard_M=torch.from_numpy(np.concatenate(hard_N)),
        topk_ids_MK=torch.from_numpy(np.concatenate([s.topk_ids_NK for s in samples])).long(),
        topk_logprobs_MK=torch.from_numpy(np.concatenate([s.topk_logprobs_NK for s in samples])),
        log_tail_mass_M=torch.from_numpy(log_tail_N),
        token_logprob_M=torch.from_numpy(np.concatenate([s.token_logprob_N for s in samples])),
        entropy_M=_column(samples, "entropy"),
        log_power_sums=_powers(samples, LOG_POWER_SUM),
        power_slopes=_powers(samples, POWER_SLOPE),
        tail_ids_MS=_rectangle(samples, TAIL_IDS, PADDING_ID),
        tail_weights_MS=_rectangle(samples, TAIL_WEIGHTS, 0.0),
        samples_cover_all=isinstance(spec.tail_samples, CountsSpec),
        sidecar_M=_column(samples, SIDECAR),
        document_M=torch.from_numpy(np.repeat(np.arange(len(samples)), lengths)),
    )


def _column(samples: Sequence[LabelledSample], name: str) -> Tensor | None:
    """An optional scalar column of all rows, float32[M]."""
    if name not in samples[0].optional:
        return None
    return torch.from_numpy(np.concatenate([s.optional[name] for s in samples]))


def _powers(samples: Sequence[LabelledSample], prefix: str) -> dict[str, Tensor]:
    """The stored columns of power sums, or of their slopes, by the name of the exponent."""
    columns = {power: _column(samples, prefix + power) for power in POWERS}
    return {power: column for power, column in columns.items() if column is not None}


def _rectangle(samples: Sequence[LabelledSample], name: str, unused: float) -> Tensor | None:
    """Tail samples of all rows, [M, S], as wide as the widest sample."""
    if name not in samples[0].optional:
        return None
    parts: list[npt.NDArray[np.generic]] = [s.optional[name] for s in samples]
    width = max(part.shape[1] for part in parts)
    padded = np.concatenate(
        [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=unused) for p in parts]
    )
    rectangle = torch.from_numpy(padded)
    return rectangle.long() if name == TAIL_IDS else rectangle
