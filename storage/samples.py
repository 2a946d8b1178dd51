"""The value that crosses from the teacher into the cache and back: one labelled sample."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.errors import BadLabelError
from storage.keys import LabelSetSpec, prompt_key, sample_key

MASS_TOLERANCE = 1e-3
"""Allowed excess of the total probability over one: float32 sums over 2**20 terms stay below."""

TOKEN_TOLERANCE_NATS = 2e-3
"""Allowed difference between the sampled token's log-prob and its entry in the top-k."""

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
    entropy_N: Float32s | None
    """float32[N]: Shannon entropy over the full vocabulary in nats; None if not captured."""
    finish_reason: str
    """``stop`` (end-of-sequence or stop string), ``length``, or ``given`` in score mode."""
    stop_reason: str | None = None
    """The stop string that ended the response, if one did."""

    @property
    def token_ids_N(self) -> Int32s:
        """int32[N]: the response token at every labelled position (the hard label)."""
        return self.response_ids_R[self.positions_N]

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

    def check(self, spec: LabelSetSpec) -> None:
        """Refuse a sample that breaks an invariant of the format.

        Raises:
            BadLabelError: naming the first violated invariant and the row.
        """
        n, k = len(self.positions_N), spec.kind.k
        inside = (self.positions_N >= 0) & (self.positions_N < len(self.response_ids_R))
        self._require(bool(inside.all()), "a position lies outside the response")
        given = self.response_ids_R if spec.generation.mode == "score" else None
        mask = None if given is None else self.label_mask_R
        expected = sample_key(
            self.prompt_ids_P, self.sample_index, response_ids=given, label_mask=mask
        )
        self._require(self.key == expected, f"its tokens have the key {expected}")
        self._require(n > 0, "it has no labelled position")
        self._require(self.topk_ids_NK.shape == (n, k), f"top-k ids are not [{n}, {k}]")
        self._require(self.topk_logprobs_NK.shape == (n, k), f"log-probs are not [{n}, {k}]")
        rows = {
            "token_logprob": self.token_logprob_N,
            "token_rank": self.token_rank_N,
            "log_tail_mass": self.log_tail_mass_N,
        }
        if "entropy" in spec.columns:
            self._require(self.entropy_N is not None, "entropy was requested and is missing")
        if self.entropy_N is not None:
            rows["entropy"] = self.entropy_N
        for name, values in rows.items():
            self._require(values.shape == (n,), f"{name} has shape {values.shape}, not ({n},)")
            self._require_rows(np.isfinite(values), f"{name} is not finite")
        for name, ids in (("response", self.response_ids_R), ("top-k", self.topk_ids_NK)):
            inside = (ids >= 0) & (ids < spec.vocab_size)
            self._require(bool(inside.all()), f"{name} ids leave the vocabulary {spec.vocab_size}")
        self._require(bool(np.all(np.diff(self.positions_N) > 0)), "positions do not increase")
        self._check_distribution()

    def _check_distribution(self) -> None:
        logprobs = self.topk_logprobs_NK.astype(np.float64)
        self._require_rows(np.isfinite(logprobs).all(axis=1), "a top-k log-prob is not finite")
        self._require_rows((np.diff(logprobs, axis=1) <= 0).all(axis=1), "top-k is not sorted")
        mass = np.exp(logprobs).sum(axis=1) + np.exp(self.log_tail_mass_N.astype(np.float64))
        self._require_rows(np.abs(mass - 1.0) <= MASS_TOLERANCE, "probabilities do not sum to 1")
        self._require_rows(self.token_rank_N >= 1, "token_rank is below 1")
        ordered = np.sort(self.topk_ids_NK, axis=1)
        self._require_rows((np.diff(ordered, axis=1) > 0).all(axis=1), "top-k ids repeat")
        is_token = self.topk_ids_NK == self.token_ids_N[:, None]
        listed = np.where(is_token, logprobs, 0.0).sum(axis=1)
        close = np.abs(listed - self.token_logprob_N) <= TOKEN_TOLERANCE_NATS
        self._require_rows(
            ~is_token.any(axis=1) | close, "token_logprob differs from the token's top-k entry"
        )
        unlisted = self.token_logprob_N <= logprobs[:, -1] + TOKEN_TOLERANCE_NATS
        self._require_rows(
            is_token.any(axis=1) | unlisted, "the token is likelier than the top-k without it"
        )

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise BadLabelError(f"sample {self.key}: {problem}")

    def _require_rows(self, good_N: npt.NDArray[np.bool_] | np.bool_, problem: str) -> None:
        if not good_N.all():
            self._require(False, f"{problem} at labelled position {int(np.argmin(good_N))}")
