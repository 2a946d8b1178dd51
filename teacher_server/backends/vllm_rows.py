"""Label columns of rows of logits: what is summed over the vocabulary, in few passes of torch.

vLLM's own sampler normalises every row, sorts out the k likeliest tokens and counts the rank of one
token. Here a row gives all of that, the tail mass and the optional columns, for less time: powers
of two instead of powers of e, the likeliest tokens in two stages, a rank over the vocabulary only
where the token is not among them, and blocks of rows that stay in the cache.

A row travels through the engine as one token id and one number per column: the response token, the
k likeliest, the scalars (ids mean nothing), the tail samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from storage.columns import LOG_POWER_SUM, POWER_SLOPE, POWERS, scalar_columns
from storage.keys import LabelSetSpec
from storage.labels import label_kind
from storage.labels.base import UNUSED_ID
from storage.tail import LOG_ZERO
from storage.tail_samples import draw_tail_samples, tail_uniforms, uniforms_needed

LOG_TAIL_MASS: Final = "log_tail_mass"

UNUSED_WEIGHT: Final = -1.0
"""Weight that marks an unused tail sample on its way; its id is 0, for engines may decode ids."""

LOG2_E: Final = 1 / math.log(2)

CPU_BLOCK_ELEMENTS: Final = 2**20
"""Of one pass over some rows: three such blocks stay in a cache of 16 MiB."""

GPU_BLOCK_ELEMENTS: Final = 2**25

GROUP_SIZE: Final = 8
"""Tokens that a stage of a top-k puts together."""

LOWEST_LOGIT: Final = -1e30
"""Stands for minus infinity, which times a probability of zero would not be zero."""


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Which columns a row has behind the response token's."""

    k: int
    """Likeliest tokens."""
    scalars: tuple[str, ...] = ()
    """Names of the scalars, as in the label table."""
    num_tail_samples: int = 0

    @property
    def num_logprobs(self) -> int:
        """How many log-probs a request has to ask for."""
        return self.k + len(self.scalars) + self.num_tail_samples

    @property
    def tail_samples(self) -> slice:
        """Columns of the tail samples."""
        first = 1 + self.k + len(self.scalars)
        return slice(first, first + self.num_tail_samples)

    def column(self, scalar: str) -> int:
        """Column of a scalar."""
        return 1 + self.k + self.scalars.index(scalar)


def captured_layout(spec: LabelSetSpec) -> RowLayout:
    """The columns that labels with a tail summed over the vocabulary need."""
    samples = spec.tail_samples
    return RowLayout(
        k=spec.kind.width,
        scalars=(LOG_TAIL_MASS, *scalar_columns(spec.columns)),
        num_tail_samples=0 if samples is None else samples.width,
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known of N rows before their response tokens are."""

    ids_NK: Tensor
    """int64[N, K], likeliest first."""
    logprobs_NK: Tensor
    """float32[N, K], nats."""
    scalars_NS: Tensor
    """float32[N, S]."""


class LabelRows:
    """Turns rows of logits into label columns.

    Args:
        spec: Which labels. Ids at or above its vocabulary are in no top-k, their mass is part of
            the tail and of the other sums.
    """

    def __init__(self, spec: LabelSetSpec) -> None:
        self.spec = spec
        self.layout = captured_layout(spec)
        self._scratch = torch.empty(0)

    def summarize(self, logits_NV: Tensor, logprobs_NV: Tensor) -> Summary:
        """Everything that does not depend on the response tokens.

        Args:
            logits_NV: Any float dtype, over the whole output layer; not changed.
            logprobs_NV: float32 of the same shape, takes the log-probs; may be ``logits_NV``.
        """
        elements = GPU_BLOCK_ELEMENTS if logits_NV.is_cuda else CPU_BLOCK_ELEMENTS
        num_rows, width = logits_NV.shape
        size = max(1, elements // width)
        blocks = [slice(begin, begin + size) for begin in range(0, num_rows, size)]
        parts = [self._summarize_block(logits_NV[rows], logprobs_NV[rows]) for rows in blocks]
        if len(parts) == 1:
            return parts[0]
        return Summary(
            torch.cat([part.ids_NK for part in parts]),
            torch.cat([part.logprobs_NK for part in parts]),
            torch.cat([part.scalars_NS for part in parts]),
        )

    def _summarize_block(self, logits_NV: Tensor, logprobs_NV: Tensor) -> Summary:
        if logits_NV.is_cuda:  # looking for infinities would wait for the device
            logits_NV = logits_NV.clamp_min(LOWEST_LOGIT)
        ids_NK = likeliest(logits_NV[:, : self.spec.vocab_size], self.layout.k)
        top_N1 = logits_NV.gather(1, ids_NK[:, :1]).float()
        if self.spec.vocab_size < logits_NV.shape[1]:
            padding = logits_NV[:, self.spec.vocab_size :].amax(dim=-1, keepdim=True)
            top_N1 = torch.maximum(top_N1, padding.float())
        masses_NV = self._scratch_like(logprobs_NV)
        torch.add(top_N1 * -LOG2_E, logits_NV, alpha=LOG2_E, out=masses_NV)
        masses_NV.exp2_()
        masses_NK = masses_NV.gather(1, ids_NK)
        # the tail is summed, not subtracted from one: no cancellation when it is small
        tail_N1 = masses_NV.scatter_(1, ids_NK, 0.0).sum(dim=-1, keepdim=True)
        total_N1 = tail_N1 + masses_NK.sum(dim=-1, keepdim=True)
        torch.sub(logits_NV, top_N1 + total_N1.log(), out=logprobs_NV)
        logprobs_NK = logprobs_NV.gather(1, ids_NK)
        found = {LOG_TAIL_MASS: (tail_N1 / total_N1).log().clamp_min(LOG_ZERO)[:, 0]}
        if "entropy" in self.layout.scalars:
            tail_part_N = masses_NV.mul_(logprobs_NV).sum(dim=-1)
            head_part_N = (masses_NK * logprobs_NK).sum(dim=-1)
            found["entropy"] = -(tail_part_N + head_part_N) / total_N1[:, 0]
        found |= self._power_sums(logprobs_NV)
        scalars_NS = torch.stack([found[name] for name in self.layout.scalars], dim=1)
        if not logits_NV.is_cuda and not scalars_NS.isfinite().all():
            finite_NV = logits_NV.clamp_min(LOWEST_LOGIT)
            if not torch.equal(finite_NV, logits_NV):
                return self._summarize_block(finite_NV, logprobs_NV)
        return Summary(ids_NK, logprobs_NK, scalars_NS)

    def _power_sums(self, logprobs_NV: Tensor) -> dict[str, Tensor]:
        """``log sum p**alpha``, and the mean of ``log p`` under weights ``p**alpha``."""
        found = {}
        powers_NV = self._scratch_like(logprobs_NV)
        for power, alpha in POWERS.items():
            if LOG_POWER_SUM + power not in self.layout.scalars:
                continue
            torch.mul(logprobs_NV, alpha * LOG2_E, out=powers_NV)
            sum_N = powers_NV.exp2_().sum(dim=-1)
            found[LOG_POWER_SUM + power] = sum_N.log()
            if POWER_SLOPE + power in self.layout.scalars:
                found[POWER_SLOPE + power] = powers_NV.mul_(logprobs_NV).sum(dim=-1) / sum_N
        return found

    def _scratch_like(self, block_NV: Tensor) -> Tensor:
        """Memory for one block; fresh memory would cost more than the arithmetic on CPU."""
        if self._scratch.numel() < block_NV.numel() or self._scratch.device != block_NV.device:
            self._scratch = torch.empty(block_NV.numel(), device=block_NV.device)
        return self._scratch[: block_NV.numel()].view(block_NV.shape)

    def tail_samples(
        self, summary: Summary, logprobs_NV: Tensor, keys: Sequence[str], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Ids int32[N, M] and weights float32[N, M]; unused weights are ``UNUSED_WEIGHT``.

        Args:
            summary: Of the rows.
            logprobs_NV: float32[N, V], nats.
            keys: Sample key of every row.
            positions: Response position of every row.
        """
        spec, width = self.spec.tail_samples, self.layout.num_tail_samples
        assert spec is not None
        top_NK = summary.logprobs_NK.cpu().numpy()
        kept_NK = np.arange(self.layout.k) < label_kind(self.spec.kind).head_sizes(top_NK)[:, None]
        head_NK = np.where(kept_NK, summary.ids_NK.cpu().numpy(), UNUSED_ID).astype(np.int32)
        ids_NM = torch.zeros(len(keys), width, dtype=torch.int32)
        weights_NM = torch.full((len(keys), width), UNUSED_WEIGHT)
        for row, (key, position) in enumerate(zip(keys, positions, strict=True)):
            uniforms_1M = tail_uniforms(key, np.array([position]), uniforms_needed(spec))
            drawn_ids, drawn_weights = draw_tail_samples(
                spec,
                logprobs_NV[row : row + 1].double().exp().cpu().numpy(),
                head_NK[row : row + 1],
                uniforms_1M,
                vocab_size=self.spec.vocab_size,
            )
            used = drawn_ids.shape[1]
            ids_NM[row, :used] = torch.from_numpy(drawn_ids[0])
            weights_NM[row, :used] = torch.from_numpy(drawn_weights[0])
        return ids_NM.to(logprobs_NV.device), weights_NM.to(logprobs_NV.device)

    def assemble(
        self,
        summary: Summary,
        logprobs_NV: Tensor,
        token_ids_N: Tensor,
        tail_samples: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids int32[N, C], numbers float32[N, C] and ranks int32[N] of the response tokens.

        Args:
            summary: Of the rows.
            logprobs_NV: float32[N, V], nats.
            token_ids_N: int64[N], response tokens.
            tail_samples: What :meth:`tail_samples` gave, if the labels have any.
        """
        first, last = 1, 1 + self.layout.k
        shape = (len(token_ids_N), 1 + self.layout.num_logprobs)
        ids_NC = torch.zeros(shape, dtype=torch.int32, device=logprobs_NV.device)
        numbers_NC = torch.empty(shape, device=logprobs_NV.device)
        token_N1 = logprobs_NV.gather(1, token_ids_N[:, None])
        ids_NC[:, 0], numbers_NC[:, :1] = token_ids_N, token_N1
        ids_NC[:, first:last], numbers_NC[:, first:last] = summary.ids_NK, summary.logprobs_NK
        numbers_NC[:, last : last + len(self.layout.scalars)] = summary.scalars_NS
        if tail_samples is not None:
            columns = self.layout.tail_samples
            ids_NC[:, columns], numbers_NC[:, columns] = tail_samples
        live_NV = logprobs_NV[:, : self.spec.vocab_size]
        return ids_NC, numbers_NC, ranks(live_NV, summary.logprobs_NK, token_N1)


def likeliest(logits_NV: Tensor, k: int) -> Tensor:
    """Ids int64[N, K] of the k largest numbers of every row, largest first.

    On CPU exact in stages: the k largest numbers lie in the k groups with the largest maxima, which
    are found in the same way, or in the rest of the row that fills no group. Group g holds the
    tokens g, g + G, g + 2 G, ..., so that maxima are taken over whole vectors.
    """
    num_rows, width = logits_NV.shape
    if logits_NV.is_cuda or 2 * k * GROUP_SIZE > width:
        return logits_NV.topk(k, dim=-1).indices
    num_groups = width // GROUP_SIZE
    grouped = num_groups * GROUP_SIZE
    maxima_NG = logits_NV[:, :grouped].view(num_rows, GROUP_SIZE, num_groups).amax(dim=1)
    groups_NK1 = likeliest(maxima_NG, k)[:, :, None]
    candidates = (groups_NK1 + torch.arange(0, grouped, num_groups)).view(num_rows, k * GROUP_SIZE)
    rest = torch.arange(grouped, width).expand(num_rows, -1)
    ids_NA = torch.cat([candidates, rest], dim=1)
    return ids_NA.gather(1, logits_NV.gather(1, ids_NA).topk(k, dim=-1).indices)


def ranks(live_NV: Tensor, top_NK: Tensor, token_N1: Tensor) -> Tensor:
    """int32[N]: one more than how many tokens are likelier than the response token.

    Args:
        live_NV: float32[N, V], log-probs of the tokens that can occur.
        top_NK: float32[N, K], the largest of them, sorted.
        token_N1: float32[N, 1], the response token's.
    """
    if live_NV.is_cuda:
        return (1 + (live_NV > token_N1).sum(dim=-1)).int()
    # whatever is likelier than a token of the top-k is in the top-k
    ranks_N = 1 + (top_NK > token_N1).sum(dim=-1, dtype=torch.int32)
    for row in (token_N1 < top_NK[:, -1:])[:, 0].nonzero()[:, 0].tolist():
        # numpy counts three times as fast as torch
        ranks_N[row] = 1 + int(np.count_nonzero(live_NV[row].numpy() > token_N1[row].numpy()))
    return ranks_N
