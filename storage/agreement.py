"""How far stored labels are from a dense recomputation, and how far they may be.

Two yardsticks. Labels computed in float32 must equal the recomputation up to ``Limits.float32``, in
every number of every row. Labels computed in a shorter dtype are compared with float32 too, and
must not be much further from it than the same model in the same dtype is, run by transformers on
the same rows: its distance is the *noise* of the dtype. Every limit is derived in
``docs/certificate.md``.

A difference x - y of log-probs and other numbers in nats is divided by 1 + |y|, y being the
recomputed one: the rounding errors of an implementation grow with the size of its logits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from storage.columns import scalar_columns
from storage.config import Config
from storage.keys import LabelSetSpec
from storage.labels.base import UNUSED_ID
from storage.labels.topk import MAX_STEPS, STEPS_PER_NAT
from storage.samples import ROUNDING_NATS, LabelledSample
from storage.sharpness import Sharpness, Slope, sharpness_of, slope_of
from storage.tail import normalized_categories

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]

LOWEST_NATS: Final = -MAX_STEPS / STEPS_PER_NAT
"""Log-probs below are stored as this value."""

KLS: Final = ("kl", "reverse_kl")
"""Differences that grow with the square of an error."""

ROUNDOFFS: Final = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Unit roundoff by dtype: half the distance from 1 to the next larger number."""

TAIL_FLOORS: Final = {"exact": 1e-12, "topk": 2e-3}
"""Tail mass below which only its absolute size counts, by ``tail`` of the spec. One minus a float32
sum is off by 2e-7, which is 1e-4 of 2e-3."""

NOISE_STANDARD_ERRORS: Final = 8.0
"""The ratio of two root mean squares of the same noise over n rows is 1 with a standard error of
about 2 / sqrt(n), for errors with heavy tails; four of them are allowed."""

LARGEST_FACTOR: Final = 2.0
"""The ratio of two maxima scatters more than that of two root mean squares."""


@dataclass(frozen=True, slots=True)
class RowNumbers:
    """What somebody says of N label rows, for the K ids that are stored."""

    logprobs_NK: Floats
    """float64[N, K], nats; minus infinity where a row keeps fewer ids."""
    log_tail_mass_N: Floats
    """float64[N]: log of the probability outside these ids, nats."""
    token_logprob_N: Floats
    """float64[N], nats."""
    scalars: Mapping[str, Floats]
    """Optional scalar columns by name, float64[N] each."""
    top_ids_NK: Ids
    """int32[N, K]: the ids that it finds likeliest itself."""


@dataclass(frozen=True, slots=True)
class DenseRows(RowNumbers):
    """What a dense recomputation says of N label rows."""

    rank_gap_N: Floats
    """float64[N], nats: between the token and the token that truly has the rank stored for it."""
    head_gaps: tuple[Floats, ...]
    """float64[N], nats, for each head that was asked about: by how much the likeliest token outside
    it is likelier than the least likely one inside; 0 for a true head. The stored head is first."""
    padding_mass_N: Floats
    """float64[N]: probability of ids at or above the effective vocabulary."""


def joined(parts: Sequence[DenseRows]) -> DenseRows:
    """Successive rows as one."""

    def column(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    return DenseRows(
        logprobs_NK=column("logprobs_NK"),
        log_tail_mass_N=column("log_tail_mass_N"),
        token_logprob_N=column("token_logprob_N"),
        scalars={
            name: np.concatenate([part.scalars[name] for part in parts])
            for name in parts[0].scalars
        },
        top_ids_NK=column("top_ids_NK"),
        rank_gap_N=column("rank_gap_N"),
        head_gaps=tuple(
            np.concatenate(gaps) for gaps in zip(*(part.head_gaps for part in parts), strict=True)
        ),
        padding_mass_N=column("padding_mass_N"),
    )


@dataclass(frozen=True, slots=True)
class Recomputed:
    """One stored sample and what was recomputed for its rows."""

    sample: LabelledSample
    exact: DenseRows
    """By the model in float32."""
    rough: DenseRows | None
    """By the model in the dtypes of the set; None where those are float32."""


class Difference(Config):
    """One number of the label rows: how far stored values are from float32 ones."""

    mean: float
    """Mean of the absolute difference."""
    p99: float
    typical: float
    """Root mean square; the mean for a KL, which is a square already."""
    typical_noise: float | None
    """The same for transformers in the dtype of the set; None for float32."""
    typical_limit: float | None
    """None for float32, where the largest difference alone is limited."""
    max: float
    max_noise: float | None
    max_limit: float

    def problem(self) -> str | None:
        """What is too large; None if both limits are kept."""
        if self.typical_limit is not None and not self.typical <= self.typical_limit:
            return f"{self.typical:.3g} is typical, allowed is {self.typical_limit:.3g}"
        if not self.max <= self.max_limit:
            return f"{self.max:.3g} occurs, allowed is {self.max_limit:.3g}"
        return None


class Agreement(Config):
    """Stored labels against a dense recomputation of the same rows."""

    sample_keys: tuple[str, ...]
    num_rows: int
    differences: dict[str, Difference]
    """By the number that is compared; ``docs/certificate.md`` defines them."""
    worst_sample: str
    """Sample whose mean KL is largest in proportion to its limit."""
    worst_sample_kl: float
    """Its mean KL, nats per position."""
    worst_sample_limit: float
    sharpness: Sharpness
    head_overlap: float
    """Share of the recomputed likeliest ids that are stored."""
    argmax_agreement: float
    """Share of rows whose likeliest id is the recomputed one."""
    padding_mass: float
    """Mean probability of ids at or above the effective vocabulary."""

    def reasons(self) -> list[str]:
        """Why the labels are unfit; empty if they are fit."""
        found = [
            f"{name} differs from the teacher's: {problem}"
            for name, problem in ((n, d.problem()) for n, d in self.differences.items())
            if problem is not None
        ]
        if not self.worst_sample_kl <= self.worst_sample_limit:
            found.append(
                f"sample {self.worst_sample} differs from the teacher by a KL of "
                f"{self.worst_sample_kl:.3g} nats per position, allowed is "
                f"{self.worst_sample_limit:.3g}"
            )
        return found + self.sharpness.reasons()


@dataclass(frozen=True, slots=True)
class Limits:
    """How far labels may be from their recomputation."""

    float32: float
    """Largest difference between two float32 implementations of the teacher."""
    noise_factor: float
    """How much further from float32 than transformers in the dtype of the set; squared for a KL."""
    max_kl: float
    """Largest mean KL of a sample that no noise excuses, nats per position."""

    vocab_size: int
    roundoff: float
    """Unit roundoff of the dtype of the set: noise below it is luck, of a few rows."""

    def exact(self, name: str) -> float:
        """Largest difference of one number in float32; ``docs/certificate.md`` has the proofs."""
        if name in KLS:
            return (ROUNDING_NATS + self.float32 * (1 + math.log(self.vocab_size))) ** 2 / 2
        # two log-probs change places if both are off
        return (2 if name in ("token_rank", "head_gap") else 1) * self.float32

    def noisy(self, name: str, noise: float, num_rows: int, *, largest: bool = False) -> float:
        """Largest size of a difference whose noise has the size ``noise`` over so many rows."""
        factor = self.noise_factor * (1 + NOISE_STANDARD_ERRORS / math.sqrt(num_rows))
        factor *= LARGEST_FACTOR if largest else 1.0
        if name in KLS:
            return self.exact(name) + factor**2 * max(noise, self.roundoff**2 / 2)
        return self.exact(name) + factor * max(noise, self.roundoff)


def compare(rows: Sequence[Recomputed], spec: LabelSetSpec, limits: Limits) -> Agreement:
    """Compare stored samples with their recomputation.

    Args:
        rows: At least one sample, all with or all without ``rough``.
        spec: Of the label set.
        limits: How far they may be apart.
    """
    stored = [_of_sample(row.sample, spec) for row in rows]
    errors = [
        _differences(numbers, row.exact, row.exact.head_gaps[0], spec)
        for numbers, row in zip(stored, rows, strict=True)
    ]
    rough = [row.rough for row in rows if row.rough is not None]
    noises = [
        _differences(numbers, row.exact, row.exact.head_gaps[1], spec)
        for numbers, row in zip(rough, rows, strict=bool(rough))
    ]
    for error, row in zip(errors, rows, strict=True):
        error["token_rank"] = _relative(row.exact.rank_gap_N, row.exact.token_logprob_N)
    for noise in noises:  # who has the wrong rank was off, or those that it was compared with
        noise["token_rank"] = noise["logprob"]
    num_rows = sum(len(row.sample.positions_N) for row in rows)
    worst, worst_kl, worst_limit = _worst_sample(rows, errors, noises, limits)
    heads = [_overlap(row.sample.topk_ids_NK, row.exact.top_ids_NK) for row in rows]
    firsts = [row.sample.topk_ids_NK[:, 0] == row.exact.top_ids_NK[:, 0] for row in rows]
    return Agreement(
        sample_keys=tuple(row.sample.key for row in rows),
        num_rows=num_rows,
        differences={
            name: _difference(name, errors, noises, limits, num_rows) for name in errors[0]
        },
        worst_sample=worst,
        worst_sample_kl=worst_kl,
        worst_sample_limit=worst_limit,
        sharpness=sharpness_of(
            _slopes(stored, rows),
            _slopes(rough, rows[: len(rough)]),
            [row.sample.key for row in rows],
            noise_factor=limits.noise_factor,
        ),
        head_overlap=float(np.mean(np.concatenate(heads))),
        argmax_agreement=float(np.mean(np.concatenate(firsts))),
        padding_mass=float(np.mean(np.concatenate([row.exact.padding_mass_N for row in rows]))),
    )


def _difference(
    name: str,
    errors: Sequence[Mapping[str, Floats]],
    noises: Sequence[Mapping[str, Floats]],
    limits: Limits,
    num_rows: int,
) -> Difference:
    sizes = np.abs(np.concatenate([error[name] for error in errors]))
    typical_noise = typical_limit = max_noise = None
    max_limit = limits.exact(name)
    if noises:
        noise = np.abs(np.concatenate([noise[name] for noise in noises]))
        typical_noise, max_noise = _typical(name, noise), float(noise.max())
        typical_limit = limits.noisy(name, typical_noise, num_rows)
        max_limit = limits.noisy(name, max_noise, num_rows, largest=True)
    return Difference(
        mean=float(sizes.mean()),
        p99=float(np.percentile(sizes, 99)),
        typical=_typical(name, sizes),
        typical_noise=typical_noise,
        typical_limit=typical_limit,
        max=float(sizes.max()),
        max_noise=max_noise,
        max_limit=max_limit,
    )


def _typical(name: str, sizes: Floats) -> float:
    return float(sizes.mean() if name in KLS else np.sqrt(np.mean(sizes**2)))


def _worst_sample(
    rows: Sequence[Recomputed],
    errors: Sequence[Mapping[str, Floats]],
    noises: Sequence[Mapping[str, Floats]],
    limits: Limits,
) -> tuple[str, float, float]:
    """Key, mean KL and limit of the sample that is worst in proportion to its limit."""
    found = []
    noise_kls = [float(noise["kl"].mean()) for noise in noises]
    for number, (row, error) in enumerate(zip(rows, errors, strict=True)):
        limit = limits.exact("kl")
        if noises:  # a short sample can be lucky in its own noise
            noise = max(noise_kls[number], float(np.mean(noise_kls)))
            limit = limits.noisy("kl", noise, len(error["kl"]))
        limit = min(limit, limits.max_kl)
        found.append((row.sample.key, float(error["kl"].mean()), limit))
    return max(found, key=lambda entry: entry[1] / entry[2])


def _of_sample(sample: LabelledSample, spec: LabelSetSpec) -> RowNumbers:
    return RowNumbers(
        logprobs_NK=sample.topk_logprobs_NK.astype(np.float64),
        log_tail_mass_N=sample.log_tail_mass_N.astype(np.float64),
        token_logprob_N=sample.token_logprob_N.astype(np.float64),
        scalars={
            name: sample.optional[name].astype(np.float64) for name in scalar_columns(spec.columns)
        },
        top_ids_NK=sample.topk_ids_NK,
    )


def _differences(
    numbers: RowNumbers, exact: DenseRows, head_gap_N: Floats, spec: LabelSetSpec
) -> dict[str, Floats]:
    """What to compare, by name; one entry per row, or per stored log-prob."""
    used_NK = np.isfinite(exact.logprobs_NK)
    theirs_U, ours_U = (_clipped(side.logprobs_NK[used_NK]) for side in (exact, numbers))
    tokens_N = np.maximum(exact.token_logprob_N, LOWEST_NATS)
    floor = TAIL_FLOORS[spec.tail]
    tails_N = np.log(np.exp(exact.log_tail_mass_N) + floor)
    last_N = np.where(used_NK, exact.logprobs_NK, np.inf).min(axis=1)
    theirs_NC, ours_NC = _categories(exact), _categories(numbers)
    return {
        "logprob": _relative(_beyond_rounding(ours_U - theirs_U), theirs_U),
        "token_logprob": _relative(
            np.maximum(numbers.token_logprob_N, LOWEST_NATS) - tokens_N, tokens_N
        ),
        "log_tail_mass": _relative(
            np.log(np.exp(numbers.log_tail_mass_N) + floor) - tails_N, tails_N
        ),
        **{
            name: _relative(values - exact.scalars[name], exact.scalars[name])
            for name, values in numbers.scalars.items()
        },
        "head_gap": _relative(head_gap_N, last_N),
        "kl": _kl(theirs_NC, ours_NC),
        "reverse_kl": _kl(ours_NC, theirs_NC),
    }


def _relative(differences: Floats, recomputed: Floats) -> Floats:
    """Differences in proportion to what float32 can resolve."""
    relative: Floats = differences / (1 + np.abs(recomputed))
    return relative


def _beyond_rounding(differences: Floats) -> Floats:
    """What of a difference being stored cannot explain."""
    excess: Floats = np.maximum(np.abs(differences) - ROUNDING_NATS, 0.0)
    return excess


def _categories(numbers: RowNumbers) -> Floats:
    """Log-probs of the stored ids and of the tail; they sum to one, float64[N, K+1]."""
    both_NC = normalized_categories(_clipped(numbers.logprobs_NK), numbers.log_tail_mass_N)
    return both_NC.astype(np.float64)


def _clipped(logprobs: Floats) -> Floats:
    """As they would be stored; unused entries stay minus infinity."""
    result: Floats = np.where(np.isneginf(logprobs), logprobs, np.maximum(logprobs, LOWEST_NATS))
    return result


def _kl(one_NC: Floats, other_NC: Floats) -> Floats:
    """KL(one || other) of every row, nats, from log-probs of the same categories."""
    p_NC = np.exp(one_NC)
    with np.errstate(invalid="ignore"):  # unused entries of both: minus infinity twice
        terms_NC = np.where(p_NC > 0, p_NC * (one_NC - other_NC), 0.0)
    kl_N: Floats = terms_NC.sum(axis=1)
    return np.maximum(kl_N, 0.0)  # rounding can leave a KL of zero at -1e-17


def _slopes(numbers: Sequence[RowNumbers], rows: Sequence[Recomputed]) -> list[Slope]:
    return [
        slope_of(_clipped(given.logprobs_NK), _clipped(row.exact.logprobs_NK))
        for given, row in zip(numbers, rows, strict=True)
    ]


def _overlap(stored_NK: Ids, recomputed_NK: Ids) -> npt.NDArray[Any]:
    """Share of the recomputed ids that are stored, of every row."""
    return np.array(
        [
            np.isin(ids_K[ids_K != UNUSED_ID], stored_K).mean()
            for stored_K, ids_K in zip(stored_NK, recomputed_NK, strict=True)
        ]
    )
