"""Whether sampled tokens were drawn from the stored distributions; needs no model.

Given its prefix, a token is a draw from its own row, whatever the rows before it were. So the
probability integral transform of every token is uniform and independent of all others, and the
ratio of two probabilities of all tokens is a martingale. Both tests below rest on nothing else;
they hold for any number of rows and for responses that end early. ``docs/certificate.md`` has the
derivations, ``categories`` says what limits of sampling leave to test.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from storage.config import Config
from storage.keys import SamplingSpec
from storage.samples import ROUNDING_NATS, LabelledSample
from storage.tail import logsumexp

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

NUM_BINS: Final = 20

MIN_ROWS: Final = 5 * NUM_BINS
"""Fewer rows give no chi-square test: every bin should expect five (Cochran 1954)."""

TEMPERATURES: Final = (0.1, 0.5, 0.8, 0.9, 1.1, 1.25, 2.0, 10.0)
"""Alternatives to the stored distribution: near 0 always the likeliest token, at 10 almost any."""

NEGLIGIBLE_PADDING: Final = 1e-5
"""Mean probability of ids that are never drawn, up to which the tail is tested like a token."""

SLACK_NATS: Final = 2 * ROUNDING_NATS + 1e-5
"""Two stored log-probs that differ by less may be in any order, or one beyond a threshold."""


class Drawing(Config):
    """How well sampled tokens fit the stored distributions."""

    method: Literal["chi_square", "greedy", "given"]
    """``greedy``: at temperature 0 every token must be the likeliest. ``given``: score mode, where
    nothing was drawn and nothing is tested."""
    num_samples: int
    num_rows: int
    tested_rows: int
    """Rows whose token lies in the part of the distribution that can be tested."""
    impossible_rows: int
    """Rows whose token the sampling settings exclude."""
    chi_square: float | None
    """Of the probability integral transform in ``NUM_BINS`` equal bins; None without a test."""
    p_value: float | None
    """Probability of a chi-square statistic at least as large."""
    log_evidence: float | None
    """Log of an e-value: of correct labels, at most one set in exp(x) reaches x."""
    worst_sample: str | None
    """Sample with the most evidence against it."""

    def reasons(self, min_p_value: float) -> list[str]:
        """Why the labels are unfit; empty if they are fit."""
        found = []
        if self.impossible_rows:
            what = "is not the likeliest" if self.method == "greedy" else "cannot be drawn"
            found.append(
                f"the sampled token of {self.impossible_rows} of {self.num_rows} rows {what} with "
                "the sampling settings of the set"
            )
        if self.p_value is not None and not self.p_value >= min_p_value:
            found.append(
                f"sampled tokens do not follow the stored distributions: chi-square "
                f"{self.chi_square:.1f} with {NUM_BINS - 1} degrees of freedom, p = "
                f"{self.p_value:.1e}"
            )
        if self.log_evidence is not None and not self.log_evidence <= -math.log(min_p_value):
            found.append(
                "sampled tokens do not follow the stored distributions: at other temperatures they "
                f"are exp({self.log_evidence:.1f}) times as likely; worst is sample "
                f"{self.worst_sample}"
            )
        return found


class DrawingTest:
    """Collects samples one by one; only a few numbers of each stay.

    Args:
        sampling: How responses were drawn; None in score mode.
        padding_mass: Mean probability of ids at or above the effective vocabulary: they are never
            drawn, but belong to the stored tail.
    """

    def __init__(self, sampling: SamplingSpec | None, *, padding_mass: float) -> None:
        self._sampling = sampling
        self._with_tail = padding_mass <= NEGLIGIBLE_PADDING
        self._counts = np.zeros(NUM_BINS, dtype=np.int64)
        self._evidence: list[tuple[str, Floats]] = []
        self._num_samples = self._num_rows = self._tested = self._impossible = 0

    def add(self, sample: LabelledSample) -> None:
        """Take up one stored sample."""
        self._num_samples += 1
        self._num_rows += len(sample.positions_N)
        if self._sampling is None:
            return
        if self._sampling.temperature == 0:
            self._impossible += int((~_is_likeliest(sample)).sum())
            return
        found = categories(sample, self._sampling, with_tail=self._with_tail)
        self._impossible += int(found.impossible_N.sum())
        rows_M = np.flatnonzero(found.place_N >= 0)
        if len(rows_M):
            weights_MC, place_M = found.log_weights_NC[rows_M], found.place_N[rows_M]
            self._tested += len(rows_M)
            uniforms_M = _transformed(weights_MC, place_M, key=sample.key)
            self._counts += np.histogram(uniforms_M, bins=NUM_BINS, range=(0.0, 1.0))[0]
            self._evidence.append((sample.key, _log_ratios(weights_MC, place_M)))

    def result(self) -> Drawing:
        """What all samples say together."""
        chi_square = p_value = log_evidence = worst = None
        if self._tested >= MIN_ROWS:
            expected = self._tested / NUM_BINS
            chi_square = float(((self._counts - expected) ** 2).sum() / expected)
            p_value = chi_square_survival(chi_square, NUM_BINS - 1)
        if self._evidence:
            log_evidence, worst = _combined(self._evidence)
        method: Literal["chi_square", "greedy", "given"] = "chi_square"
        if self._sampling is None:
            method = "given"
        elif self._sampling.temperature == 0:
            method = "greedy"
        return Drawing(
            method=method,
            num_samples=self._num_samples,
            num_rows=self._num_rows,
            tested_rows=self._tested,
            impossible_rows=self._impossible,
            chi_square=chi_square,
            p_value=p_value,
            log_evidence=log_evidence,
            worst_sample=worst,
        )


@dataclass(frozen=True, slots=True)
class Categories:
    """The part of N distributions that can be tested, and where the tokens lie in it."""

    log_weights_NC: Floats
    """float64[N, C]: log-probs up to a constant, at the temperature of sampling, likeliest first;
    minus infinity for what is not tested."""
    place_N: npt.NDArray[np.int64]
    """int64[N]: category of the token, -1 if it lies outside."""
    impossible_N: Bools
    """bool[N]: the sampling settings exclude the token."""


def categories(sample: LabelledSample, sampling: SamplingSpec, *, with_tail: bool) -> Categories:
    """What of the rows of a sample can be tested exactly.

    If a set S of tokens depends on the row only, and sampling may draw each of them, then a token
    that fell into S has the stored probabilities, divided by their sum. So limits are handled by
    leaving out every stored id that they exclude or might exclude, in view of rounding; and the
    tail counts as one more token where all of it can be drawn: without limits, at temperature 1.

    Limits apply in the order temperature, min_p, top_k, top_p.
    """
    used_NK = np.isfinite(sample.topk_logprobs_NK)
    logprobs_NK = sample.topk_logprobs_NK.astype(np.float64)
    weights_NK = logprobs_NK / sampling.temperature
    token_N = sample.token_logprob_N.astype(np.float64) / sampling.temperature
    slack = SLACK_NATS / sampling.temperature
    sure_NK, possible_NK = used_NK.copy(), used_NK.copy()
    impossible_N = np.zeros(len(token_N), dtype=np.bool_)
    width = weights_NK.shape[1]
    if sampling.min_p > 0:
        lowest_N1 = weights_NK[:, :1] + math.log(sampling.min_p)
        sure_NK &= weights_NK >= lowest_N1 + slack
        possible_NK &= weights_NK >= lowest_N1 - slack
        impossible_N |= token_N < lowest_N1[:, 0] - slack
    if sampling.top_k > 0:
        last = min(sampling.top_k, width) - 1
        possible_NK &= weights_NK >= weights_NK[:, last, None] - slack
        sure_NK[:, last + 1 :] = False
        if last + 1 < width:  # equal log-probs on both sides of the limit: either may be kept
            sure_NK &= weights_NK > weights_NK[:, last + 1, None]
        if sampling.top_k <= width:
            impossible_N |= token_N < weights_NK[:, last] - slack
    if sampling.top_p < 1:
        weight_NK = np.where(sure_NK, np.exp(weights_NK), 0.0)
        before_NK = np.cumsum(weight_NK, axis=1) - weight_NK
        total_N1 = weight_NK.sum(axis=1, keepdims=True)  # at most the true normaliser
        sure_NK &= before_NK * math.exp(slack) < sampling.top_p * total_N1
        impossible_N |= _beyond_top_p(weights_NK, possible_NK, token_N, sampling, slack)
    is_token_NK = (sample.topk_ids_NK == sample.token_ids_N[:, None]) & sure_NK
    place_N = np.where(is_token_NK.any(axis=1), is_token_NK.argmax(axis=1), -1)
    log_weights_NC = np.where(sure_NK, weights_NK, -np.inf)
    limited = sampling.min_p > 0 or sampling.top_k > 0 or sampling.top_p < 1
    if with_tail and not limited and sampling.temperature == 1:
        tail_N1 = sample.log_tail_mass_N[:, None].astype(np.float64)
        log_weights_NC = np.concatenate([log_weights_NC, tail_N1], axis=1)
        place_N = np.where(place_N < 0, width, place_N)
    return Categories(log_weights_NC, place_N.astype(np.int64), impossible_N)


def _beyond_top_p(
    weights_NK: Floats, possible_NK: Bools, token_N: Floats, sampling: SamplingSpec, slack: float
) -> Bools:
    """Tokens before which there is more than ``top_p`` of the mass, however it is normalised."""
    head_NK = np.where(possible_NK, np.exp(weights_NK), 0.0)
    normalizer_N = np.full(len(token_N), 1.0 if sampling.temperature == 1 else np.inf)
    if 0 < sampling.top_k <= weights_NK.shape[1]:
        normalizer_N = np.minimum(normalizer_N, head_NK.sum(axis=1))
    is_before_NK = possible_NK & (weights_NK > token_N[:, None] + slack)
    # if the token passed min_p and top_k, then so did all that are likelier
    before_N = np.where(is_before_NK, head_NK, 0.0).sum(axis=1)
    beyond_N: Bools = before_N >= sampling.top_p * normalizer_N * math.exp(2 * slack)
    return beyond_N


def _is_likeliest(sample: LabelledSample) -> Bools:
    """Whether the token has rank 1, or is as likely as the likeliest up to rounding."""
    behind_N = sample.topk_logprobs_NK[:, 0].astype(np.float64) - sample.token_logprob_N
    likeliest_N: Bools = (sample.token_rank_N == 1) | (behind_N <= SLACK_NATS)
    return likeliest_N


def _transformed(log_weights_MC: Floats, place_M: npt.NDArray[np.int64], *, key: str) -> Floats:
    """Randomised probability integral transform: uniform in [0, 1) if tokens follow the rows.

    The probability of all likelier categories, plus a random part of the token's own. The random
    numbers depend on the sample key only, so the statistic can be computed again.
    """
    p_MC = np.exp(log_weights_MC - logsumexp(log_weights_MC)[:, None])
    rows = np.arange(len(place_M))
    below_M = np.cumsum(p_MC, axis=1)[rows, place_M] - p_MC[rows, place_M]
    parts_M = np.random.default_rng(int(key, 16)).random(len(place_M))
    transformed_M: Floats = below_M + parts_M * p_MC[rows, place_M]
    return np.clip(transformed_M, 0.0, np.nextafter(1.0, 0.0))  # sums may round beyond 1


def _log_ratios(log_weights_MC: Floats, place_M: npt.NDArray[np.int64]) -> Floats:
    """Log of how much likelier the tokens are at each of ``TEMPERATURES``, float64[T]."""
    rows = np.arange(len(place_M))
    stated_M = log_weights_MC[rows, place_M] - logsumexp(log_weights_MC)
    ratios = []
    for temperature in TEMPERATURES:
        tempered_MC = log_weights_MC / temperature
        ratios.append((tempered_MC[rows, place_M] - logsumexp(tempered_MC) - stated_M).sum())
    return np.array(ratios)


def _combined(evidence: Sequence[tuple[str, Floats]]) -> tuple[float, str]:
    """Log of the mean of two e-values, and the sample with the most evidence against it.

    Each likelihood ratio expects 1 under the stored distributions; so do their means over the
    temperatures and over the samples. The first takes all tokens together and finds a mistake that
    all samples share, the second takes each sample alone and finds the one that is wrong.
    """
    ratios_ST = np.stack([ratios for _, ratios in evidence])
    num_temperatures = math.log(len(TEMPERATURES))
    together = float(logsumexp(ratios_ST.sum(axis=0)[None])[0]) - num_temperatures
    alone_S = logsumexp(ratios_ST) - num_temperatures
    mean_alone = float(logsumexp(alone_S[None])[0]) - math.log(len(alone_S))
    both = float(np.logaddexp(together, mean_alone)) - math.log(2)
    return both, evidence[int(np.argmax(alone_S))][0]


def chi_square_survival(statistic: float, degrees: int) -> float:
    """Probability that a chi-square variable is at least ``statistic``.

    The regularised upper incomplete gamma function Q(degrees/2, statistic/2), by its finite sum for
    whole and half arguments: Q(a + 1, x) = Q(a, x) + x**a exp(-x) / Gamma(a + 1), from
    Q(1, x) = exp(-x) or Q(1/2, x) = erfc(sqrt x).

    Source:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 6.5.21 and 26.4.4.
    """
    x = statistic / 2
    if x == 0:
        return 1.0
    a, survival = (0.5, math.erfc(math.sqrt(x))) if degrees % 2 else (1.0, math.exp(-x))
    while a < degrees / 2:
        survival += math.exp(a * math.log(x) - x - math.lgamma(a + 1))
        a += 1
    return min(survival, 1.0)
