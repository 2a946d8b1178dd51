"""Labels of one set made from labels of another by leaving out: a smaller k, fewer columns.

The dropped ids go into the tail, so the narrowed label is as exact as the stored one.
"""

from dataclasses import replace

import numpy as np

from storage.columns import arrow_columns
from storage.keys import CountsSpec, LabelSetSpec
from storage.labels import label_kind
from storage.labels.base import UNUSED_ID
from storage.samples import LabelledSample
from storage.tail import LOG_ZERO


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


def narrow(sample: LabelledSample, wanted: LabelSetSpec) -> LabelledSample:
    """A sample with no more than ``wanted`` asks for.

    Args:
        sample: Of a label set that satisfies ``wanted``, or captured with at least its width.
        wanted: Spec of the labels to make.
    """
    width = wanted.kind.width
    kept_columns = arrow_columns(wanted)
    heads_N = label_kind(wanted.kind).head_sizes(sample.topk_logprobs_NK)
    stored = np.arange(sample.topk_ids_NK.shape[1])
    kept_NK = (stored < heads_N[:, None]) & (sample.topk_ids_NK != UNUSED_ID)
    dropped_NK = np.where(kept_NK, -np.inf, sample.topk_logprobs_NK.astype(np.float64))
    tail_N = np.logaddexp(
        sample.log_tail_mass_N.astype(np.float64),
        np.logaddexp.reduce(dropped_NK, axis=1, initial=-np.inf),
    )
    return replace(
        sample,
        topk_ids_NK=np.where(kept_NK, sample.topk_ids_NK, UNUSED_ID)[:, :width],
        topk_logprobs_NK=np.where(kept_NK, sample.topk_logprobs_NK, -np.inf).astype(np.float32)[
            :, :width
        ],
        log_tail_mass_N=np.maximum(tail_N, LOG_ZERO).astype(np.float32),
        optional={name: values for name, values in sample.optional.items() if name in kept_columns},
    )
