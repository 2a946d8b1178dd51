"""The value that crosses from the teacher into the cache and back: one labelled sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.checks import MASS_TOLERANCE, require_rows
from storage.columns import Columns, check_columns, check_disjoint, check_shapes
from storage.errors import (
    BadLabelError,
    MassError,
    NotFiniteError,
    UnsortedError,
    VocabularyError,
)
from storage.keys import LabelSetSpec, prompt_key, sample_key
from storage.labels.base import UNUSED_ID

ROUNDING_NATS = 1 / 512
"""Largest change of a log-prob by being stored."""

TOKEN_TOLERANCE_NATS = 2e-3
"""Allowed difference between the sampled token's log-prob and its entry in the top-k."""

CHECKED_ROWS = 512
"""Rows whose probabilities are summed at a time."""

Int32s = npt.NDArray[np.int32]
Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LabelledSample:
    """One response and the teacher's labels for its N labelled positions (N <= R).

    Row n labels the distribution that *predicted* the response token at ``positions_N[n]``.
    """

    key: str
    """Sample key."""
    sample_index: int
    """Number of this response to its prompt, from 0."""
    prompt_ids_P: Int32s
    """int32[P]: tokens given to the teacher."""
    response_ids_R: Int32s
    """int32[R]: response tokens, a generated end-of-sequence token included."""
    positions_N: Int32s
    """int32[N]: response-relative, increasing; every position unless a label mask left gaps."""
    token_logprob_N: Float32s
    """float32[N]: log-prob of the response token, nats, temperature 1, full vocabulary."""
    token_rank_N: Int32s
    """int32[N]: rank of the response token, 1 is the likeliest."""
    log_tail_mass_N: Float32s
    """float32[N]: log of the probability outside the top-k, nats."""
    topk_ids_NK: Int32s
    """int32[N, K]: the teacher's K likeliest tokens, likeliest first."""
    topk_logprobs_NK: Float32s
    """float32[N, K]: their log-probs in nats at temperature 1; exp(row) sums to at most 1."""
    optional: Columns = field(default_factory=dict, kw_only=True)
    """Optional columns of the N rows by the name of their Arrow column (``storage/columns.py``)."""
    finish_reason: str
    """``stop`` (end-of-sequence or stop string), ``length``, or ``given`` in score mode."""
    stop_reason: str | None = None
    """The stop string that ended the response, if one did."""

    @property
    def entropy_N(self) -> Float32s | None:
        """float32[N]: Shannon entropy over the full vocabulary in nats; None if not captured."""
        return self.optional.get("entropy")

    @property
    def token_ids_N(self) -> Int32s:
        """int32[N]: the response token at every labelled position (the hard label)."""
        return self.response_ids_R[self.positions_N]

    @property
    def optional_names(self) -> frozenset[str]:
        """Names of the optional columns."""
        return frozenset(self.optional)

    def optional_column(self, name: str) -> npt.NDArray[Any]:
        """One of the optional columns."""
        column: npt.NDArray[Any] = self.optional[name]
        return column

    @property
    def label_mask_R(self) -> npt.NDArray[np.bool_]:
        """bool[R]: which response tokens are labelled."""
        mask = np.zeros(len(self.response_ids_R), dtype=np.bool_)
        mask[self.positions_N] = True
        return mask

    @property
    def prompt_key(self) -> str:
        """Digest of the prompt's token ids."""
        return prompt_key(self.prompt_ids_P)

    def check(self, spec: LabelSetSpec, *, stored: bool = False) -> None:
        """Refuse a sample that breaks an invariant of the format.

        Args:
            spec: Of the label set.
            stored: The log-probs were read from a shard, rounded.

        Raises:
            BadLabelError: naming the first violated invariant and the row. Its subclasses
                NotFiniteError, VocabularyError, MassError and UnsortedError tell what was wrong.
        """
        self._check_tokens(spec)
        n, k = len(self.positions_N), spec.kind.width
        self._require(n > 0, "it has no labelled position")
        self._require(self.topk_ids_NK.shape == (n, k), f"top-k ids are not [{n}, {k}]")
        self._require(self.topk_logprobs_NK.shape == (n, k), f"log-probs are not [{n}, {k}]")
        scalars = {
            "token_id": self.token_ids_N,
            "token_logprob": self.token_logprob_N,
            "token_rank": self.token_rank_N,
            "log_tail_mass": self.log_tail_mass_N,
        }
        for name, values in scalars.items():
            self._require(values.shape == (n,), f"{name} has shape {values.shape}, not ({n},)")
        check_shapes(self.optional, spec, n, name=f"sample {self.key}")
        rounding = ROUNDING_NATS if stored else 0.0
        self._check_topk(spec)
        name = f"sample {self.key}"
        check_rows(
            scalars, self.topk_ids_NK, self.topk_logprobs_NK, spec, name=name, rounding=rounding
        )
        self._check_hard_label(rounding)
        check_columns(self.optional, self.log_tail_mass_N, spec, name=name)
        check_disjoint(self.optional, self.topk_ids_NK, spec, name=name)

    def _check_tokens(self, spec: LabelSetSpec) -> None:
        """Positions, response and key belong together."""
        ids = self.response_ids_R
        if not bool(((ids >= 0) & (ids < spec.vocab_size)).all()):
            raise VocabularyError(
                f"sample {self.key}: response ids leave the vocabulary {spec.vocab_size}"
            )
        inside = (self.positions_N >= 0) & (self.positions_N < len(ids))
        self._require(bool(inside.all()), "a position lies outside the response")
        self._require(bool(np.all(np.diff(self.positions_N) > 0)), "positions do not increase")
        given = ids if spec.generation.mode == "score" else None
        mask = None if given is None else self.label_mask_R
        expected = sample_key(
            self.prompt_ids_P, self.sample_index, response_ids=given, label_mask=mask
        )
        self._require(self.key == expected, f"its tokens have the key {expected}")

    def _check_topk(self, spec: LabelSetSpec) -> None:
        """Finite, sorted, no id twice, unused entries last."""
        used = (self.topk_ids_NK != UNUSED_ID) | (spec.kind.type == "topk")
        kept_N = used.sum(axis=1)
        self._require_rows(kept_N > 0, "no token is kept")
        self._require_rows(
            (used == (np.arange(used.shape[1]) < kept_N[:, None])).all(axis=1),
            "an unused entry stands before a used one",
        )
        logprobs = np.where(used, self.topk_logprobs_NK, np.float32(0.0))
        self._require_rows(
            np.isfinite(logprobs).all(axis=1), "a top-k log-prob is not finite", NotFiniteError
        )
        falling = (np.diff(logprobs, axis=1) <= 0) | ~used[:, 1:]
        self._require_rows(falling.all(axis=1), "top-k is not sorted", UnsortedError)
        self._require_rows(
            (used | (self.topk_logprobs_NK == -np.inf)).all(axis=1),
            "an unused entry has a log-prob",
        )
        ordered = np.sort(self.topk_ids_NK, axis=1)
        repeats = (np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] != UNUSED_ID)
        self._require_rows(~repeats.any(axis=1), "top-k ids repeat", UnsortedError)

    def _check_hard_label(self, rounding: float) -> None:
        """The response token's own log-prob agrees with the top-k."""
        tolerance = TOKEN_TOLERANCE_NATS + rounding
        logprobs = self.topk_logprobs_NK.astype(np.float64)
        is_token = self.topk_ids_NK == self.token_ids_N[:, None]
        listed = is_token.any(axis=1)
        of_token = np.where(is_token, logprobs, 0.0).sum(axis=1)
        self._require_rows(self.token_rank_N >= 1, "token_rank is below 1")
        self._require_rows(
            ~listed | (np.abs(of_token - self.token_logprob_N) <= tolerance),
            "token_logprob differs from the token's top-k entry",
        )
        last = np.where(self.topk_ids_NK == UNUSED_ID, np.inf, logprobs).min(axis=1)
        self._require_rows(
            listed | (self.token_logprob_N <= last + tolerance),
            "the token is likelier than the top-k without it",
        )

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise BadLabelError(f"sample {self.key}: {problem}")

    def _require_rows(
        self,
        good_N: npt.NDArray[np.bool_],
        problem: str,
        error: type[BadLabelError] = BadLabelError,
    ) -> None:
        require_rows(good_N, f"sample {self.key}: {problem}", error)


def check_rows(
    scalars: Mapping[str, npt.NDArray[Any]],
    ids_NK: Int32s,
    logprobs_NK: Float32s,
    spec: LabelSetSpec,
    *,
    name: str,
    rounding: float = ROUNDING_NATS,
) -> None:
    """Refuse label rows that cannot be a teacher's; cheap enough for every read.

    Args:
        scalars: Mandatory scalar columns of the N rows by name.
        ids_NK: int32[N, K]; UNUSED_ID where a row keeps fewer tokens.
        logprobs_NK: float32[N, K] in nats.
        spec: Of the label set.
        name: What to call the rows in errors.
        rounding: Largest change of a log-prob by being stored, in nats.

    Raises:
        NotFiniteError: for NaN or an infinity.
        VocabularyError: for an id outside the effective vocabulary.
        MassError: for probabilities that do not sum to one.
    """
    for column, values_N in scalars.items():
        if values_N.dtype.kind == "f":
            require_rows(np.isfinite(values_N), f"{name}: {column} is not finite", NotFiniteError)
    lowest = UNUSED_ID if spec.kind.type == "mass" else 0
    for column, ids in (("token_id", scalars["token_id"]), ("a top-k id", ids_NK)):
        smallest = 0 if column == "token_id" else lowest
        if ids.min(initial=smallest) < smallest or ids.max(initial=0) >= spec.vocab_size:
            raise VocabularyError(f"{name}: {column} leaves the vocabulary {spec.vocab_size}")
    mass_N = _sums_of_exp(logprobs_NK) + np.exp(scalars["log_tail_mass"])
    good_N = np.abs(mass_N - 1.0) <= MASS_TOLERANCE + rounding
    require_rows(good_N, f"{name}: probabilities do not sum to 1", MassError)


def _sums_of_exp(logprobs_NK: Float32s) -> Float32s:
    """float32[N]: of every row; some rows at a time, so that what is in between stays in cache."""
    sums_N = np.empty(len(logprobs_NK), dtype=np.float32)
    scratch = np.empty((CHECKED_ROWS, logprobs_NK.shape[1]), dtype=np.float32)
    ones_K = np.ones(logprobs_NK.shape[1], dtype=np.float32)
    for start in range(0, len(sums_N), CHECKED_ROWS):
        rows = slice(start, start + CHECKED_ROWS)
        exp_nK = np.exp(logprobs_NK[rows], out=scratch[: len(sums_N[rows])])
        np.matmul(exp_nK, ones_K, out=sums_N[rows])  # faster than sum
    return sums_N
