"""From the rows that vLLM reports to labelled samples; numpy alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.columns import TAIL_IDS, TAIL_WEIGHTS, scalar_columns
from storage.keys import LabelSetSpec, MassSpec
from storage.labels.base import UNUSED_ID
from storage.narrow import narrow
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.tail import log_tail_mass_of
from teacher_server.backends.vllm_capture import ArrayRows
from teacher_server.backends.vllm_rows import LOG_TAIL_MASS, RowLayout
from teacher_server.errors import CaptureError


@dataclass(frozen=True, slots=True)
class EngineRows:
    """Rows of one request: the response token's column first, then those of the layout."""

    ids_NC: npt.NDArray[np.int32]
    numbers_NC: npt.NDArray[np.float32]
    ranks_N: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ranks_N)

    def pick(self, rows: Any) -> "EngineRows":
        """Some of the rows."""
        return EngineRows(self.ids_NC[rows], self.numbers_NC[rows], self.ranks_N[rows])


def engine_rows(logprobs: Any) -> EngineRows:
    """Rows as the front end collected them: arrays, or vLLM's flat log-probs."""
    if isinstance(logprobs, ArrayRows):
        return EngineRows(*logprobs.arrays())
    # the first prompt token has a row without entries
    starts = [
        start
        for start, end in zip(logprobs.start_indices, logprobs.end_indices, strict=True)
        if end > start
    ]
    ranks_N = np.array([logprobs.ranks[start] for start in starts], dtype=np.int32)
    shape = (len(starts), len(logprobs.logprobs) // max(1, len(starts)))
    return EngineRows(
        np.array(logprobs.token_ids, dtype=np.int32).reshape(shape),
        np.array(logprobs.logprobs, dtype=np.float32).reshape(shape),
        ranks_N,
    )


def joined(parts: Sequence[EngineRows]) -> EngineRows:
    """Rows one after another."""
    if len(parts) == 1:
        return parts[0]
    return EngineRows(
        np.concatenate([part.ids_NC for part in parts]),
        np.concatenate([part.numbers_NC for part in parts]),
        np.concatenate([part.ranks_N for part in parts]),
    )


def labelled_positions(request: SampleRequest, num_tokens: int) -> npt.NDArray[np.int32]:
    """Response positions that are labelled, int32[N]."""
    if request.label_mask_R is None:
        return np.arange(num_tokens, dtype=np.int32)
    return np.flatnonzero(request.label_mask_R).astype(np.int32)


def to_sample(
    request: SampleRequest,
    response_R: npt.NDArray[np.int32],
    rows: EngineRows,
    spec: LabelSetSpec,
    layout: RowLayout,
    *,
    finish_reason: str,
    stop_reason: str | None,
) -> LabelledSample:
    """The sample of a request.

    Args:
        request: Its label mask says which positions are labelled.
        response_R: int32[R], the response.
        rows: Of the labelled positions, in order.
        spec: Which labels.
        layout: Of the rows; without scalars they are vLLM's own, over the padded vocabulary.
        finish_reason: How the response ended.
        stop_reason: The stop string that ended it, if one did.

    Raises:
        CaptureError: if the rows are not those of the response's tokens.
    """
    positions_N = labelled_positions(request, len(response_R))
    _require_rows_of(request.key, response_R[positions_N], rows, layout)
    if not layout.scalars:
        rows = _without_padding(request.key, rows, spec)
    top = slice(1, 1 + spec.kind.width)
    # copies: the rows of the engine hold more columns, and room for more rows
    topk_logprobs_NK = rows.numbers_NC[:, top].copy()
    sample = LabelledSample(
        key=request.key,
        sample_index=request.sample_index,
        prompt_ids_P=request.prompt_ids_P,
        response_ids_R=response_R,
        positions_N=positions_N,
        token_logprob_N=rows.numbers_NC[:, 0].copy(),
        token_rank_N=rows.ranks_N.copy(),
        log_tail_mass_N=_log_tail_mass(rows, layout, topk_logprobs_NK),
        topk_ids_NK=rows.ids_NC[:, top].copy(),
        topk_logprobs_NK=topk_logprobs_NK,
        optional=_optional(rows, spec, layout),
        finish_reason=finish_reason,
        stop_reason=stop_reason,
    )
    return narrow(sample, spec) if isinstance(spec.kind, MassSpec) else sample


def _require_rows_of(
    key: str, tokens_N: npt.NDArray[np.int32], rows: EngineRows, layout: RowLayout
) -> None:
    """One row for every labelled token, with the columns that were asked for."""
    columns = 1 + layout.num_logprobs
    if len(rows) != len(tokens_N) or (len(rows) and rows.ids_NC.shape[1] != columns):
        raise CaptureError(
            f"sample {key}: vLLM gave {len(rows)} rows of {rows.ids_NC.shape[1]} columns for "
            f"{len(tokens_N)} labelled tokens and {columns} columns; the sample is not stored. "
            "Report it with the vLLM version"
        )
    wrong = np.flatnonzero(rows.ids_NC[:, 0] != tokens_N)
    if len(wrong):
        row = int(wrong[0])
        raise CaptureError(
            f"sample {key}: row {row} is that of token {int(rows.ids_NC[row, 0])}, the response "
            f"has token {int(tokens_N[row])} there; the sample is not stored. Report it with the "
            "vLLM version"
        )


def _without_padding(key: str, rows: EngineRows, spec: LabelSetSpec) -> EngineRows:
    """Public rows without ids of the padded vocabulary, and with ranks that leave them out.

    Of a token behind all reported ones vLLM counts the rank over the padded vocabulary; padding
    that is not reported stays counted.
    """
    k = spec.kind.width
    ids_NC, numbers_NC = rows.ids_NC[:, 1:], rows.numbers_NC[:, 1:]
    live_NC = ids_NC < spec.vocab_size
    if (live_NC.sum(axis=1) < k).any():
        raise CaptureError(
            f"sample {key}: vLLM gave fewer than {k} tokens of the vocabulary {spec.vocab_size} "
            "for a row; use the transformers backend"
        )
    order_NK = np.argsort(~live_NC, axis=1, kind="stable")[:, :k]
    token_N1 = rows.numbers_NC[:, :1]
    counted_N = 1 + (live_NC & (numbers_NC > token_N1)).sum(axis=1, dtype=np.int32)
    listed_N = rows.numbers_NC[:, 0] >= numbers_NC[:, -1]
    unlisted_N = rows.ranks_N - (~live_NC).sum(axis=1, dtype=np.int32)
    return EngineRows(
        np.concatenate([rows.ids_NC[:, :1], np.take_along_axis(ids_NC, order_NK, 1)], axis=1),
        np.concatenate([token_N1, np.take_along_axis(numbers_NC, order_NK, 1)], axis=1),
        np.where(listed_N, counted_N, unlisted_N),
    )


def _log_tail_mass(
    rows: EngineRows, layout: RowLayout, topk_logprobs_NK: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    if layout.scalars:
        return rows.numbers_NC[:, layout.column(LOG_TAIL_MASS)].copy()
    return log_tail_mass_of(topk_logprobs_NK).astype(np.float32)


def _optional(
    rows: EngineRows, spec: LabelSetSpec, layout: RowLayout
) -> dict[str, npt.NDArray[Any]]:
    found: dict[str, npt.NDArray[Any]] = {
        name: rows.numbers_NC[:, layout.column(name)].copy()
        for name in scalar_columns(spec.columns)
    }
    if spec.tail_samples is not None:
        weights_NM = rows.numbers_NC[:, layout.tail_samples]
        used_NM = weights_NM >= 0
        width = int(used_NM.sum(axis=1).max(initial=0))
        ids_NM = np.where(used_NM, rows.ids_NC[:, layout.tail_samples], UNUSED_ID)
        found[TAIL_IDS] = ids_NM[:, :width]
        found[TAIL_WEIGHTS] = np.where(used_NM, weights_NM, np.float32(0))[:, :width]
    return found
