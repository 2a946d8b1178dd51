"""The Arrow schemas of the two files of a shard (``docs/format.md`` section 4)."""

from typing import Final

import pyarrow as pa

from storage.columns import column_fields
from storage.keys import LabelSetSpec, canonical_json
from storage.labels import label_kind
from storage.labels.topk import STEPS_PER_NAT

FORMAT_VERSION: Final = 1
"""A reader refuses every version it does not know; version 1 stays readable for ever."""

SCALAR_FIELDS = [
    pa.field("sample", pa.int32(), nullable=False),
    pa.field("position", pa.int32(), nullable=False),
    pa.field("token_id", pa.int32(), nullable=False),
    pa.field("token_logprob", pa.float32(), nullable=False),
    pa.field("token_rank", pa.int32(), nullable=False),
    pa.field("log_tail_mass", pa.float32(), nullable=False),
]


def labels_schema(spec: LabelSetSpec) -> pa.Schema:
    """Schema of ``*.labels.arrow``: one row per labelled position."""
    fields = SCALAR_FIELDS + column_fields(spec) + label_kind(spec.kind).fields()
    return pa.schema(fields, metadata=_metadata(spec, "labels"))


def samples_schema(spec: LabelSetSpec) -> pa.Schema:
    """Schema of ``*.samples.arrow``: one row per sample."""
    fields = [
        pa.field("sample_key", pa.string(), nullable=False),
        pa.field("prompt_key", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("first_row", pa.int32(), nullable=False),
        pa.field("num_rows", pa.int32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32())),
        pa.field("label_mask", pa.list_(pa.bool_())),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("stop_reason", pa.string()),
    ]
    return pa.schema(fields, metadata=_metadata(spec, "samples"))


def _metadata(spec: LabelSetSpec, table: str) -> dict[str, str]:
    return {
        "distillcache.format": str(FORMAT_VERSION),
        "distillcache.table": table,
        "distillcache.label_set": spec.key,
        "distillcache.spec": canonical_json(spec),
        "distillcache.logprob_steps_per_nat": str(STEPS_PER_NAT),
    }
