"""Tokens sampled from the teacher's distribution, with weights that estimate it without bias.

Top-k labels say nothing about single tokens of the tail. A few sampled tokens with weights t do:
``E[t_v] = p_v`` for every token v they cover, so every loss that is linear in the teacher's
probabilities (cross-entropy, forward KL) has the gradient of the full distribution on average.

* ``stratified``: m tokens of the tail, one from each of m equal parts of its probability r, weight
  r/m each. Covers the tail; the stored ids cover themselves. Source: stratified sampling by
  inversion, Cochran, Sampling Techniques, chapter 5.
* ``threshold``: tail tokens with p >= tau as they are; any other with probability p/tau and weight
  tau, by one systematic pass. Covers the tail. Source: probability-proportional-to-size sampling
  with a fixed threshold, Madow 1949; Duffield, Lund and Thorup, Priority sampling, 2007.
* ``counts``: N independent draws from the whole distribution, weight count/N. Covers every token by
  itself. Source: random sampling distillation, Sparse Logit Sampling, arXiv 2503.16870.

The random numbers are a pure function of sample key and position, so they do not depend on
batches, engines or restarts. ``docs/format.md`` section 4.4 is the specification. This is plain
numpy over dense rows: what every engine must agree with.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from storage.keys import CountsSpec, StratifiedSpec, TailSampleSpec, ThresholdSpec
from storage.labels.base import UNUSED_ID

Floats = npt.NDArray[np.float64]

TailSamples = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""Ids int32[N, M], ascending in every row, and weights float32[N, M]; unused entries stand last and
have the id ``UNUSED_ID`` and the weight 0."""

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)
_UNIFORM_BITS = 53


# -- random numbers --------------------------------------------------------------------------------
def tail_seed(key: str) -> int:
    """Seed of a sample's tail samples, in [0, 2**64)."""
    digest = hashlib.sha256(f"distillcache tail\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def tail_uniforms(key: str, positions_N: npt.NDArray[np.integer], count: int) -> Floats:
    """Random numbers float64[N, count] in [0, 1) of some positions of a sample.

    Position n is the seed of a SplitMix64 generator of its own: output number n of the generator
    that the sample key seeds.

    Args:
        key: Sample key.
        positions_N: int[N], response-relative.
        count: Numbers per position; a larger count begins with the same numbers.

    Source:
        Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    positions = np.asarray(positions_N).astype(np.uint64)
    seeds_N1 = _splitmix64(np.uint64(tail_seed(key)), positions)[:, None]
    outputs_NM = _splitmix64(seeds_N1, np.arange(count, dtype=np.uint64)[None])
    # exact: the integers have as many bits as a float64
    return (outputs_NM >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float64) * 2.0**-_UNIFORM_BITS


def _splitmix64(
    seed: np.uint64 | npt.NDArray[np.uint64], number: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Outputs of SplitMix64 by their numbers, from 0; arithmetic is modulo 2**64."""
    state = seed + _INCREMENT * (number + np.uint64(1))
    state = (state ^ (state >> np.uint64(30))) * _FIRST_FACTOR
    state = (state ^ (state >> np.uint64(27))) * _SECOND_FACTOR
    mixed: npt.NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return mixed


def uniforms_needed(spec: TailSampleSpec) -> int:
    """Random numbers that the samples of one position take."""
    return 1 if isinstance(spec, ThresholdSpec) else spec.draws


# -- drawing ---------------------------------------------------------------------------------------
def draw_tail_samples(
    spec: TailSampleSpec,
    probabilities_NV: Floats,
    head_ids_NK: npt.NDArray[np.int32],
    uniforms_NM: Floats,
    *,
    vocab_size: int,
) -> TailSamples:
    """Sample tokens of N dense distributions.

    Args:
        spec: How.
        probabilities_NV: float64[N, V], of every row of the output layer; rows sum to one.
        head_ids_NK: int32[N, K], the stored ids, ``UNUSED_ID`` where a row keeps fewer. The tail
            are all other tokens below ``vocab_size``.
        uniforms_NM: float64[N, M] in [0, 1); M is :func:`uniforms_needed`.
        vocab_size: Effective vocabulary; ids at or above it are never returned.

    Returns:
        Ids and weights, as wide as the row with most entries.
    """
    rows = []
    for probabilities_V, head_ids_K, uniforms_M in zip(
        probabilities_NV, head_ids_NK, uniforms_NM, strict=True
    ):
        if isinstance(spec, CountsSpec):
            rows.append(_counts(probabilities_V, uniforms_M, vocab_size))
            continue
        tail_V = probabilities_V[:vocab_size].copy()
        tail_V[head_ids_K[head_ids_K != UNUSED_ID]] = 0.0
        if isinstance(spec, StratifiedSpec):
            rows.append(_stratified(tail_V, uniforms_M))
        else:
            rows.append(_threshold(tail_V, spec.threshold, float(uniforms_M[0])))
    return padded(rows)


def padded(rows: list[tuple[npt.NDArray[np.integer], Floats]]) -> TailSamples:
    """Rows of ids and weights as two rectangles, as wide as the longest row."""
    width = max((len(ids) for ids, _ in rows), default=0)
    ids_NM = np.full((len(rows), width), UNUSED_ID, np.int32)
    weights_NM = np.zeros((len(rows), width), np.float32)
    for row, (ids, weights) in enumerate(rows):
        ids_NM[row, : len(ids)], weights_NM[row, : len(ids)] = ids, weights
    return ids_NM, weights_NM


def _stratified(tail_V: Floats, uniforms_M: Floats) -> tuple[npt.NDArray[np.integer], Floats]:
    mass = tail_V.sum()
    points_M = (np.arange(len(uniforms_M)) + uniforms_M) / len(uniforms_M)
    ids, counts = np.unique(_inverted(tail_V, points_M), return_counts=True)
    return ids, counts * (mass / len(uniforms_M))


def _counts(
    probabilities_V: Floats, uniforms_M: Floats, vocab_size: int
) -> tuple[npt.NDArray[np.integer], Floats]:
    """A draw that falls on the padding of the output layer counts for no token."""
    drawn = _inverted(probabilities_V, uniforms_M)
    ids, counts = np.unique(drawn[drawn < vocab_size], return_counts=True)
    return ids, counts / len(uniforms_M)


def _inverted(masses_V: Floats, points_M: Floats) -> npt.NDArray[np.integer]:
    """The tokens at some places, in [0, 1), of the running sum of their masses; none if all are 0.

    A token without mass is never returned.
    """
    cumulative_V = np.cumsum(masses_V)
    if cumulative_V[-1] <= 0.0:
        return np.zeros(0, np.int64)
    places_M = np.searchsorted(cumulative_V, points_M * cumulative_V[-1], side="right")
    # a point that rounding put at the very end belongs to the last token with mass
    ids_M: npt.NDArray[np.integer] = np.minimum(places_M, np.flatnonzero(masses_V)[-1])
    return ids_M


def _threshold(
    tail_V: Floats, threshold: float, offset: float
) -> tuple[npt.NDArray[np.integer], Floats]:
    """One pass over the rare tokens: those are kept whose interval holds offset, offset + 1, ..."""
    sure = np.flatnonzero(tail_V >= threshold)
    cumulative_V = np.cumsum(np.where(tail_V < threshold, tail_V, 0.0)) / threshold
    points = offset + np.arange(np.ceil(cumulative_V[-1]))
    places = np.searchsorted(cumulative_V, points[points < cumulative_V[-1]], side="right")
    ids = np.concatenate([sure, np.unique(places)])
    weights = np.concatenate([tail_V[sure], np.full(len(ids) - len(sure), threshold)])
    order = np.argsort(ids)
    return ids[order], weights[order]
