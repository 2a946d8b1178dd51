"""Labels of one set made from labels of another by leaving out: a smaller k, fewer columns.

The dropped ids go into the tail, so the narrowed label is as exact as the stored one.
"""

from dataclasses import replace
from typing import TypeVar

import numpy as np

from storage.columns import arrow_columns
from storage.keys import CountsSpec, LabelSetSpec
from storage.label_batch import LabelBatch
from storage.labels import label_kind
from storage.labels.base import UNUSED_ID
from storage.samples import LabelledSample
from storage.tail import LOG_ZERO

Labels = TypeVar("Labels", LabelledSample, LabelBatch)


def satisfies(stored: LabelSetSpec, wanted: LabelSetSpec) -> bool:
    """Whether every label that ``wanted`` asks for can be made from one of ``stored``.

    Samples of the tail serve no smaller head: what is dropped joins the tail unsampled. Counts
    cover the whole distribution and serve every head.
    """
    covers_head = wanted.tail_samples is None or isinstance(wanted.tail_samples, CountsSpec)
    return (
        stored.generation == wanted.generation
        and stored.vocab_size == wanted.vocab_size
        and stored.tail in (wanted.tail, "exact")
        and set(stored.columns) >= set(wanted.columns)
        and label_kind(stored.kind).covers(wanted.kind)
        and (covers_head or stored.kind == wanted.kind)
    )


def narrow(labels: Labels, wanted: LabelSetSpec) -> Labels:
    """A sample, or a batch of them, with no more than ``wanted`` asks for.

    Args:
        labels: Of a label set that satisfies ``wanted``, or captured with at least its width.
        wanted: Spec of the labels to make.
    """
    width = wanted.kind.width
    kept_columns = arrow_columns(wanted)
    heads_N = label_kind(wanted.kind).head_sizes(labels.topk_logprobs_NK)
    stored = np.arange(labels.topk_ids_NK.shape[1])
    kept_NK = (stored < heads_N[:, None]) & (labels.topk_ids_NK != UNUSED_ID)
    head_NK = kept_NK[:, :width]
    dropped_NK = np.where(kept_NK, -np.inf, labels.topk_logprobs_NK.astype(np.float64))
    tail_N = np.logaddexp(
        labels.log_tail_mass_N.astype(np.float64),
        np.logaddexp.reduce(dropped_NK, axis=1, initial=-np.inf),
    )
    return replace(
        labels,
        topk_ids_NK=np.where(head_NK, labels.topk_ids_NK[:, :width], UNUSED_ID),
        topk_logprobs_NK=np.where(head_NK, labels.topk_logprobs_NK[:, :width], np.float32(-np.inf)),
        log_tail_mass_N=np.maximum(tail_N, LOG_ZERO).astype(np.float32),
        optional={name: values for name, values in labels.optional.items() if name in kept_columns},
    )
