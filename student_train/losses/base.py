"""Values that losses exchange.

Shape legend: M supervised rows, K stored tokens, C = K + 1 categories (the tail is the last),
S sampled tokens, V vocabulary, H hidden size.

How the parts meet:

* A *divergence* is a function ``(teacher_MC, student_MC, **options)`` to value and gradient
  (:class:`Divergence`); ``DIVERGENCES`` in ``student_train/losses/__init__.py`` names them all.
* ``make_divergence(config, schedule={"t": 0.4})`` in ``student_train/losses/soft_term.py`` binds
  the options of a config, and what changes from step to step, into a ``SoftTerm``: still callable
  as ``(teacher_MC, student_MC)``, and telling a kernel its temperature and its samples. What
  changes from step to step is a float in ``schedule``: ``t`` for TAID, ``progress`` (0 at the
  first step of the run, 1 at the last) for a temperature that moves. It is made anew every
  optimiser step, at no cost, and never inside an accumulation window.
* A kernel asks ``SoftTerm.teacher_categories(rows, dtype)`` for ``teacher_MC``, and hands over
  ``student_MC``: log-probs of softmax(logits / ``SoftTerm.temperature``) on the same categories.
  Derivatives with respect to logits get the factor 1 / temperature. Hard labels stay at 1.
* Where ``SoftTerm.sampled`` is true, the kernel also gathers the student's log-probs at
  ``rows.tail_ids_MS`` and adds what ``SoftTerm.sample_terms(rows, student_MS)`` says: a value of
  every row and its derivative with respect to ``student_MS``. ``teacher_MC`` has no tail then.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

PADDING_ID = -1
"""Marks an unused entry of the top-k or of the tail samples."""

NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """Teacher labels of M supervised positions.

    Row m labels the prediction made at row m of the compacted hidden states. What the label set
    does not store is None, or missing from its mapping.
    """

    hard_M: Tensor
    """int64[M]: hard label."""
    topk_ids_MK: Tensor
    """int64[M, K]: stored tokens, distinct in a row; PADDING_ID where unused."""
    topk_logprobs_MK: Tensor
    """float[M, K]: their log-probs, nats, temperature 1, normalised over the full vocabulary."""
    log_tail_mass_M: Tensor
    """float[M]: log of the probability outside the stored tokens; -inf is allowed."""
    token_logprob_M: Tensor | None = None
    """float[M]: teacher's log-prob of the response token, whatever ``hard_M`` holds."""
    entropy_M: Tensor | None = None
    """float[M]: Shannon entropy of the full distribution, nats."""
    log_power_sums: Mapping[str, Tensor] = field(default_factory=dict)
    """float[M] each: L(alpha) = log sum p**alpha over the full vocabulary, by the names of
    ``storage.columns.POWERS`` (``"50"`` is alpha = 0.5)."""
    power_slopes: Mapping[str, Tensor] = field(default_factory=dict)
    """float[M] each: L'(alpha), by the same names; not stored for every alpha."""
    tail_ids_MS: Tensor | None = None
    """int64[M, S]: sampled tokens; PADDING_ID where unused."""
    tail_weights_MS: Tensor | None = None
    """float[M, S]: their weights, whose mean is the token's probability; 0 where unused."""
    samples_cover_all: bool = False
    """True where the samples estimate every token (``counts``), False where only the tail."""
    sidecar_M: Tensor | None = None
    """float[M]: column of a sidecar, computed by somebody else for every token."""
    document_M: Tensor | None = None
    """int64[M]: number of the row's sample. Rows of a sample are consecutive, in text order."""

    def __len__(self) -> int:
        return self.hard_M.shape[0]

    def rows(self, start: int, stop: int) -> "TeacherRows":
        """Rows ``start`` to ``stop``."""
        return self._map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> "TeacherRows":
        """The same rows on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TeacherRows":
        changes: dict[str, object] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changes[f.name] = function(value)
            elif isinstance(value, Mapping):
                changes[f.name] = {name: function(tensor) for name, tensor in value.items()}
        return replace(self, **changes)  # type: ignore[arg-type]

    def distinct(self) -> "TeacherRows":
        """The same rows with every repeated stored token marked as unused, except its first.

        Stores refuse repeated ids, so this only guards rows that come from elsewhere.
        """
        ordered_MK, order_MK = self.topk_ids_MK.sort(dim=-1, stable=True)
        again_MK = torch.zeros_like(ordered_MK, dtype=torch.bool)
        again_MK[:, 1:] = ordered_MK[:, 1:] == ordered_MK[:, :-1]
        repeated_MK = torch.zeros_like(again_MK).scatter(-1, order_MK, again_MK)
        return replace(self, topk_ids_MK=self.topk_ids_MK.masked_fill(repeated_MK, PADDING_ID))

    def stored(self, dtype: torch.dtype) -> Tensor:
        """Log-probs of the stored tokens, [M, K], -inf where unused."""
        unused_MK = self.topk_ids_MK == PADDING_ID
        return self.topk_logprobs_MK.to(dtype).masked_fill(unused_MK, NEG_INF)

    def categories(self, dtype: torch.dtype) -> Tensor:
        """Log-probs of the k+1 categories, [M, C], normalised to sum to one.

        The cache rounds log-probs; normalising once keeps every divergence non-negative.
        """
        tail_M1 = self.log_tail_mass_M.to(dtype).unsqueeze(-1)
        both_MC = torch.cat([self.stored(dtype), tail_M1], dim=-1)
        return both_MC - both_MC.logsumexp(dim=-1, keepdim=True)


class Divergence(Protocol):
    """A divergence on categories, with its gradient written out."""

    def __call__(self, teacher_MC: Tensor, student_MC: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient of every row.

        Args:
            teacher_MC: float[M, C], log-probs of the teacher; -inf where it gives no mass.
            student_MC: float[M, C], log-probs of the student; -inf where it gives no mass, as in
                every unused category.

        Returns:
            The divergence in nats, float[M], and its derivative with respect to ``student_MC``,
            float[M, C], taken as if the student's log-probs were independent. It is 0 in an unused
            category, where both have no mass.
        """


class RowWeighting(Protocol):
    """Weights of soft and hard terms, decided row by row while the loss is computed."""

    def __call__(
        self, rows: TeacherRows, place: slice, student_logprob_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights of the soft and of the hard term, detached, [N] each.

        Called once for every part of a micro-batch, from its first row to its last.

        Args:
            rows: Labels of N consecutive rows.
            place: Where they are in the micro-batch.
            student_logprob_N: float[N], the student's log-prob of their hard labels, temperature 1.
        """


@dataclass(frozen=True, slots=True)
class FixedWeights:
    """A :class:`RowWeighting` of weights that are known before."""

    soft_M: Tensor
    """float[M]: weight of the soft term."""
    hard_M: Tensor
    """float[M]: weight of the hard term."""

    def __call__(
        self, rows: TeacherRows, place: slice, student_logprob_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Their part."""
        return self.soft_M[place], self.hard_M[place]


class LossTerms(NamedTuple):
    """What a loss returns: a sum with gradient, and detached terms to look at.

    A tuple, because DeepSpeed prepares a backward pass in hooks on the tensors that it finds in
    what a module returns, and it looks into tuples, lists and dicts only.
    """

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
    student_MC: Tensor
    """float32[M, C]: the student's log-probs of the categories at temperature 1, detached."""
    metrics: Mapping[str, Tensor] = MappingProxyType({})
    """float[M] each: what this loss reports besides, detached, by the name of its metric."""


def load(target: str) -> object:
    """Resolve an import string ``module:name`` of a registry."""
    module, name = target.split(":")
    return cast(object, getattr(importlib.import_module(module), name))
