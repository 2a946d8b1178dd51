"""Values that losses exchange.

Shape legend: M supervised rows, K stored tokens, C = K + 1 categories (the tail is the last),
V vocabulary, H hidden size.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol, cast

import torch
from torch import Tensor

PADDING_ID = -1
"""Marks an unused entry of the top-k."""


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """Teacher labels of M supervised positions.

    Row m labels the prediction made at row m of the compacted hidden states.
    """

    hard_M: Tensor
    """int64[M]: hard label."""
    topk_ids_MK: Tensor
    """int64[M, K]: stored tokens, distinct in a row; PADDING_ID where unused."""
    topk_logprobs_MK: Tensor
    """float[M, K]: their log-probs, nats, temperature 1, normalised over the full vocabulary."""
    log_tail_mass_M: Tensor
    """float[M]: log of the probability outside the stored tokens; -inf is allowed."""

    def __len__(self) -> int:
        return self.hard_M.shape[0]

    def rows(self, start: int, stop: int) -> "TeacherRows":
        """Rows ``start`` to ``stop``."""
        return self._map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> "TeacherRows":
        """The same rows on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TeacherRows":
        return replace(self, **{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def categories(self, dtype: torch.dtype) -> Tensor:
        """Log-probs of the k+1 categories, [M, C], normalised to sum to one.

        The cache rounds log-probs; normalising once keeps every divergence non-negative.
        """
        unused = self.topk_ids_MK == PADDING_ID
        stored = self.topk_logprobs_MK.to(dtype).masked_fill(unused, float("-inf"))
        both = torch.cat([stored, self.log_tail_mass_M.to(dtype).unsqueeze(-1)], dim=-1)
        return both - both.logsumexp(dim=-1, keepdim=True)


class Divergence(Protocol):
    """A divergence on categories, with its gradient written out."""

    def __call__(self, teacher_MC: Tensor, student_MC: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient of every row.

        Args:
            teacher_MC: float[M, C], log-probs of the teacher; -inf where it gives no mass.
            student_MC: float[M, C], log-probs of the student.

        Returns:
            The divergence in nats, float[M], and its derivative with respect to ``student_MC``,
            float[M, C], taken as if the student's log-probs were independent.
        """


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What a loss returns: a sum with gradient, and detached terms to look at."""

    total: Tensor
    """Scalar with gradient: nats, *summed* over rows. The trainer divides by the global count."""
    soft_M: Tensor
    """float32[M]: unweighted divergence of every row, detached."""
    hard_M: Tensor
    """float32[M]: unweighted cross-entropy of every row, detached."""
    soft_weight_M: Tensor
    """float32[M]: weight that the soft term got."""
    student_argmax_M: Tensor
    """int64[M]: the student's likeliest token."""


def load(target: str) -> object:
    """Resolve an import string ``module:name`` of a registry."""
    module, name = target.split(":")
    return cast(object, getattr(importlib.import_module(module), name))
