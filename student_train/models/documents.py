"""Documents that share a row: exactly what each would be alone.

A packed micro-batch is one row of documents, one after the other. Positions begin at 0 in each, and
none attends to another. Two ways to that, of which :func:`isolate_documents` takes the first that
a model passes:

1. ``per_document``: an attention function that goes through the documents one by one. No mask is
   made, so time and memory grow with the squares of the documents' lengths, not with the square
   of the row. Models whose attention is PyTorch's (``sdpa``), with or without sliding windows.
2. ``masked``: the model's own attention with the block-diagonal mask that transformers derives
   from restarting positions. For models that need an attention of their own (soft-capped scores).

Both fail silently where a model does not forward what they need, so a model is asked, not known.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from student_train.errors import PreflightError

PER_DOCUMENT = "distillcache_per_document"
"""Name of the attention function in transformers."""

PROBE_LENGTHS = (5, 3, 1, 7)
"""Documents of the probe, tokens each."""

PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference of hidden states relative to their largest; other documents change them by
about 1."""

Isolation = Literal["per_document", "masked"]


def document_inputs(input_ids_BT: Tensor, ends: tuple[int, ...]) -> dict[str, Any]:
    """What a base model is called with for one row of documents.

    Args:
        input_ids_BT: int64[1, T].
        ends: Where each document ends, the last at T.
    """
    lengths = [end - start for start, end in zip((0, *ends), ends, strict=False)]
    position_ids_T = torch.cat([torch.arange(length) for length in lengths])
    starts = torch.tensor([0, *ends], dtype=torch.int32, device=input_ids_BT.device)
    return {
        "input_ids": input_ids_BT,
        "position_ids": position_ids_T.unsqueeze(0).to(input_ids_BT.device),
        "attention_mask": None,
        # a cache, which is made by default, turns transformers' detection of documents off
        "use_cache": False,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "document_ends": ends,
    }


def attend_per_document(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    *,
    document_ends: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of every document to itself: ``sdpa`` of transformers, once per document.

    Args:
        module: The layer.
        query_BHTD: float[1, heads, T, D].
        key_BHTD: float[1, key heads, T, D].
        value_BHTD: float[1, key heads, T, D].
        attention_mask: None: there is no padding.
        document_ends: Where documents end; one document without it.
        sliding_window: Positions that a token sees, itself included; None for all before it.
        options: Of the model, passed on.
    """
    del attention_mask
    ends = document_ends or (query_BHTD.shape[2],)
    found = []
    for start, end in zip((0, *ends), ends, strict=False):
        length = end - start
        windowed = sliding_window is not None and length > sliding_window
        mask = _band(length, sliding_window, query_BHTD.device) if windowed else None
        output_BTHD, _ = sdpa_attention_forward(
            module,
            query_BHTD[:, :, start:end],
            key_BHTD[:, :, start:end],
            value_BHTD[:, :, start:end],
            mask,
            **{**options, "is_causal": True},
        )
        found.append(output_BTHD)
    return torch.cat(found, dim=1), None


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool[1, 1, T, T]: the last ``window`` positions up to each."""
    assert window is not None
    every_TT = torch.ones(length, length, dtype=torch.bool, device=device)
    return every_TT.tril().triu(1 - window)[None, None]


AttentionInterface.register(PER_DOCUMENT, attend_per_document)


def isolate_documents(language_model: Any) -> Isolation:
    """Set a model up for packed rows, and make sure that they change nothing.

    The model is then for training alone: with ``per_document`` its attention sees no padding mask.

    Raises:
        PreflightError: if documents of a row would see each other.
    """
    before = language_model.config._attn_implementation
    if before == "sdpa":
        language_model.set_attn_implementation(PER_DOCUMENT)
        if packing_error(language_model) <= _tolerance(language_model):
            return "per_document"
        language_model.set_attn_implementation(before)
    difference = packing_error(language_model)
    if not difference <= _tolerance(language_model):
        raise PreflightError(
            f"{type(language_model).__name__} lets documents of a packed row see each other (its "
            f"hidden states change by {difference:.1e} of the largest); set train.batch.packing: "
            "padded"
        )
    return "masked"


def _tolerance(language_model: Any) -> float:
    return PROBE_TOLERANCE[next(language_model.parameters()).dtype]


@torch.no_grad()
def packing_error(language_model: Any) -> float:
    """Largest difference of hidden states between a packed row and its documents alone, relative.

    Returns infinity where the model refuses a packed row.
    """
    was_training = language_model.training
    language_model.eval()
    device = next(language_model.parameters()).device
    ends = tuple(torch.tensor(PROBE_LENGTHS).cumsum(0).tolist())
    ids_BT = 1 + torch.arange(ends[-1], device=device).unsqueeze(0)
    alone = [
        language_model.base_model(
            input_ids=ids_BT[:, start:end],
            attention_mask=torch.ones_like(ids_BT[:, start:end]),
            use_cache=False,
        ).last_hidden_state[0]
        for start, end in zip((0, *ends), ends, strict=False)
    ]
    try:
        packed = language_model.base_model(**document_inputs(ids_BT, ends)).last_hidden_state[0]
    except (TypeError, ValueError, RuntimeError):
        # an argument it does not know, or shapes it does not take: it cannot be packed
        return float("inf")
    finally:
        language_model.train(was_training)
    expected = torch.cat(alone)
    difference = float((packed - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return difference if difference == difference else float("inf")
