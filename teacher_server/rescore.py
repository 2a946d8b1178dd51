"""Score stored samples again, densely, with transformers: what certificates compare labels with."""

from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.agreement import LOWEST_NATS, DenseRows, joined
from storage.keys import LabelSetSpec
from storage.labels.base import UNUSED_ID
from storage.samples import LabelledSample
from storage.tail import LOG_ZERO
from teacher_server.backends.base import TeacherJob
from teacher_server.backends.transformers_reference import TransformersBackend
from teacher_server.config import TransformersBackendConfig
from teacher_server.dense_rows import CHUNK_ROWS, RowLabels, label_rows

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]


class Rescorer(Protocol):
    """Recomputes the distributions of stored samples."""

    def describe(self) -> dict[str, str]:
        """Engine, version and device, for provenance."""

    def score(self, sample: LabelledSample, heads: Sequence[Ids] = ()) -> DenseRows:
        """What the model says of the rows of a sample, for its stored ids.

        Args:
            sample: A stored sample.
            heads: More heads, int32[N, K] each, of which the gap is wanted.
        """

    def close(self) -> None:
        """Free the model."""


class TransformersRescorer(TransformersBackend):
    """One forward pass over prompt and response, then a few rows at a time."""

    @torch.inference_mode()
    def score(self, sample: LabelledSample, heads: Sequence[Ids] = ()) -> DenseRows:
        """See the protocol."""
        logits_NV = self.logits(sample.prompt_ids_P, sample.response_ids_R, sample.positions_N)
        chunks = [slice(n, n + CHUNK_ROWS) for n in range(0, len(logits_NV), CHUNK_ROWS)]
        return joined([self._dense(logits_NV[rows], sample, heads, rows) for rows in chunks])

    def _dense(
        self, logits_NV: Tensor, sample: LabelledSample, heads: Sequence[Ids], rows: slice
    ) -> DenseRows:
        """Everything of a few rows of a sample."""
        spec = self._job.spec
        logprobs_NV = logits_NV.float().log_softmax(dim=-1)
        live_NV = logprobs_NV[:, : spec.vocab_size]
        labels = label_rows(
            logprobs_NV, sample.token_ids_N[rows], sample.positions_N[rows], spec, sample.key
        )
        stored_NK = sample.topk_ids_NK[rows]
        ids_NK, used_NK = _indices(stored_NK, logprobs_NV)
        kept_NK = live_NV.gather(1, ids_NK).double().clamp_min(LOWEST_NATS)
        probabilities_NV = logprobs_NV.double().exp()
        tail_N = probabilities_NV.scatter(1, ids_NK, 0.0).sum(dim=-1).log()
        gaps = (_head_gap(live_NV, head[rows]) for head in heads)
        return DenseRows(
            logprobs_NK=_numpy(kept_NK.masked_fill(~used_NK, -torch.inf)),
            log_tail_mass_N=_numpy(tail_N.clamp_min(LOG_ZERO)),
            token_logprob_N=labels.token_logprob_N.astype(np.float64),
            scalars={name: values.astype(np.float64) for name, values in labels.optional.items()},
            top_ids_NK=labels.topk_ids_NK,
            rank_gap_N=_rank_gap(live_NV, sample.token_rank_N[rows], labels),
            head_gaps=(_head_gap(live_NV, stored_NK), *gaps),
            padding_mass_N=_numpy(probabilities_NV[:, spec.vocab_size :].sum(dim=-1)),
        )


def start_rescorer(
    model: str, spec: LabelSetSpec, *, threads: int, exact: bool, adapter: str | None = None
) -> TransformersRescorer:
    """Load a teacher to score samples of a label set again.

    Args:
        model: Directory of the teacher.
        spec: Of the label set.
        threads: CPU threads.
        exact: In float32 throughout, whatever the dtypes of the set.
        adapter: Directory of the LoRA adapter that it labelled with.

    Raises:
        TeacherError: if transformers cannot run this teacher.
    """
    changes: dict[str, object] = {"mode": "score", "sampling": None}
    if exact:
        changes |= {"compute_dtype": "float32", "head_dtype": "float32"}
    # samples of the tail depend on sums over the vocabulary to the last bit: they cannot be
    # compared number by number
    names = tuple(column for column in spec.columns if isinstance(column, str))
    generation = spec.generation.model_copy(update=changes)
    return TransformersRescorer(
        TeacherJob(
            model=model,
            adapter=adapter,
            backend=TransformersBackendConfig(threads=threads),
            spec=spec.model_copy(update={"generation": generation, "columns": names}),
            max_model_len=1,  # limits answers, and there are none
        )
    )


def _rank_gap(live_NV: Tensor, stated_N: Ids, labels: RowLabels) -> Floats:
    """Nats between the token and the token that has the rank stated for it, float64[N]."""
    gap_N = np.zeros(len(stated_N))
    wrong = np.flatnonzero(stated_N != labels.token_rank_N)
    if len(wrong):  # sorting a vocabulary is slow, and most ranks agree
        sorted_MV = live_NV[torch.as_tensor(wrong, device=live_NV.device)].sort(descending=True)
        places_M1 = np.clip(stated_N[wrong, None].astype(np.int64), 1, live_NV.shape[1]) - 1
        there_M1 = sorted_MV.values.gather(1, torch.as_tensor(places_M1, device=live_NV.device))
        gap_N[wrong] = np.abs(_numpy(there_M1[:, 0]) - labels.token_logprob_N[wrong])
    return gap_N


def _head_gap(live_NV: Tensor, head_NK: Ids) -> Floats:
    """By how much the likeliest id outside a head exceeds the least likely inside, float64[N]."""
    ids_NK, used_NK = _indices(head_NK, live_NV)
    inside_N = live_NV.gather(1, ids_NK).masked_fill(~used_NK, torch.inf).amin(dim=-1)
    outside_N = live_NV.scatter(1, ids_NK, -torch.inf).amax(dim=-1)
    return _numpy((outside_N.clamp_min(LOWEST_NATS) - inside_N.clamp_min(LOWEST_NATS)).clamp_min(0))


def _indices(ids_NK: Ids, like: Tensor) -> tuple[Tensor, Tensor]:
    """Ids as indices, unused ones repeating the first of their row, and which are used."""
    used_NK = ids_NK != UNUSED_ID
    indices_NK = np.where(used_NK, ids_NK, ids_NK[:, :1]).astype(np.int64)
    device = like.device
    return torch.as_tensor(indices_NK, device=device), torch.as_tensor(used_NK, device=device)


def _numpy(values: Tensor) -> Floats:
    return cast(Floats, values.double().cpu().numpy())
