"""Tail samples estimate what they cover without bias, with the random numbers of the format."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.keys import CountsSpec, StratifiedSpec, TailSampleSpec, ThresholdSpec
from storage.labels.base import UNUSED_ID
from storage.tail_samples import draw_tail_samples, padded, tail_uniforms, uniforms_needed

KEY = "05bb47e075415ac7b915353ec04912f4"
MASSES = st.lists(st.integers(0, 6), min_size=3, max_size=12).filter(sum)
"""Probabilities of a vocabulary in units of their sum: some are zero."""


# -- random numbers --------------------------------------------------------------------------------
def splitmix64(seed: int, number: int) -> int:
    """The generator in exact integers, as it was published."""
    x = (seed + 0x9E3779B97F4A7C15 * (number + 1)) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_the_generator_of_the_tests_is_the_published_one() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567, number) for number in range(3)] == published


@given(st.text(max_size=8), st.integers(0, 2**31 - 1), st.integers(0, 2000))
def test_uniforms_are_bit_for_bit_those_of_exact_integers(
    key: str, position: int, number: int
) -> None:
    digest = hashlib.sha256(b"distillcache tail\0" + key.encode()).digest()
    seed = splitmix64(int.from_bytes(digest[:8], "little"), position)
    expected = (splitmix64(seed, number) >> 11) / 2**53
    found = tail_uniforms(key, np.array([position], np.int32), number + 1)
    assert found.shape == (1, number + 1)
    assert found[0, number] == expected


def test_uniforms_are_pinned() -> None:
    found = tail_uniforms(KEY, np.array([0, 7]), 2)
    assert found[0].tolist() == [0.7718860143672257, 0.0932393535001429]
    assert found[1, 0] == 0.6105703502616597


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=20), st.integers(1, 9))
def test_a_position_has_its_numbers_whatever_is_asked_beside_it(
    positions: list[int], count: int
) -> None:
    together = tail_uniforms(KEY, np.array(positions), count + 3)
    for row, position in enumerate(positions):
        alone = tail_uniforms(KEY, np.array([position]), count)
        np.testing.assert_array_equal(together[row, :count], alone[0])


def test_uniforms_are_even_over_keys_positions_and_numbers() -> None:
    """Means and correlations of neighbours, in units of their standard deviations."""
    keys = [hashlib.sha256(bytes([n])).hexdigest()[:32] for n in range(50)]
    found = np.stack([tail_uniforms(key, np.arange(50), 40) for key in keys]) - 0.5
    assert len(np.unique(found)) == found.size  # 1e5 numbers of 53 bits
    deviation = np.sqrt(1 / 12)
    for axis in range(3):
        moved = np.moveaxis(found, axis, 0)
        count = moved[0].size
        means = moved.reshape(len(moved), -1).mean(axis=1) / (deviation / np.sqrt(count))
        assert np.abs(means).max() < 4.5
        products = moved[1:] * moved[:-1] * 12
        assert abs(products.mean()) * np.sqrt(products.size) < 4.5


def test_random_numbers_needed() -> None:
    assert uniforms_needed(StratifiedSpec(draws=3)) == 3
    assert uniforms_needed(CountsSpec(draws=7)) == 7
    assert uniforms_needed(ThresholdSpec(threshold=0.5)) == 1


# -- no bias, by integration over the random numbers -----------------------------------------------
def mean_weights(
    spec: TailSampleSpec,
    masses: list[int],
    head: list[int],
    num_parts: int,
    vocab_size: int | None = None,
) -> np.ndarray:
    """Mean weight of every token over the random numbers, exactly.

    What is drawn changes only where a random number is a multiple of ``1 / num_parts``, so the
    middles of these parts are an exact integral. Every random number of a row takes the same value:
    draws depend on one number each, and a mean of sums needs no independence.
    """
    probabilities = np.array(masses) / sum(masses)
    middles = (np.arange(num_parts) + 0.5) / num_parts
    vocab_size = len(masses) if vocab_size is None else vocab_size
    ids_NM, weights_NM = draw_tail_samples(
        spec,
        np.tile(probabilities, (num_parts, 1)),
        np.tile(np.array(head, np.int32), (num_parts, 1)),
        np.repeat(middles[:, None], uniforms_needed(spec), axis=1),
        vocab_size=vocab_size,
    )
    used = ids_NM != UNUSED_ID
    mean = np.bincount(ids_NM[used], weights_NM[used], minlength=len(masses)) / num_parts
    assert len(mean) == len(masses)
    return mean


@given(MASSES, st.data())
def test_stratified_samples_estimate_the_tail(masses: list[int], data: st.DataObject) -> None:
    head = data.draw(st.lists(st.integers(0, len(masses) - 1), max_size=2, unique=True))
    tail = np.array(masses)
    tail[head] = 0
    spec = StratifiedSpec(draws=data.draw(st.integers(1, 5)))
    found = mean_weights(spec, masses, head, max(1, tail.sum()))
    np.testing.assert_allclose(found, tail / sum(masses), atol=1e-7)


@given(MASSES, st.data())
def test_counts_estimate_every_token(masses: list[int], data: st.DataObject) -> None:
    """A token of the head too; the padding of the vocabulary is drawn and left out."""
    vocab_size = data.draw(st.integers(2, len(masses)))
    spec = CountsSpec(draws=data.draw(st.integers(1, 5)))
    found = mean_weights(spec, masses, [0], sum(masses), vocab_size)
    expected = np.array(masses) / sum(masses)
    expected[vocab_size:] = 0.0
    np.testing.assert_allclose(found, expected, atol=1e-7)


@given(MASSES, st.data())
def test_threshold_samples_estimate_the_tail(masses: list[int], data: st.DataObject) -> None:
    """The threshold is so many units of probability, so its parts are so many."""
    head = data.draw(st.lists(st.integers(0, len(masses) - 1), max_size=2, unique=True))
    tail = np.array(masses)
    tail[head] = 0
    units = data.draw(st.integers(1, max(1, sum(masses) - 1)))
    spec = ThresholdSpec(threshold=(units - 0.25) / sum(masses))  # no token is just at it
    # intervals are multiples of 1 / (4 * units - 1)
    found = mean_weights(spec, masses, head, 4 * units - 1)
    np.testing.assert_allclose(found, tail / sum(masses), atol=1e-7)


@pytest.mark.parametrize(
    "spec", [StratifiedSpec(draws=4), ThresholdSpec(threshold=0.03), CountsSpec(draws=12)], ids=str
)
def test_the_mean_over_positions_is_the_distribution(spec: TailSampleSpec) -> None:
    """With the real random numbers: the error of a mean of 20 000 positions."""
    probabilities = np.random.default_rng(0).dirichlet(np.full(40, 0.3))
    head = np.argsort(-probabilities)[:4].astype(np.int32)
    count = 20_000
    ids_NM, weights_NM = draw_tail_samples(
        spec,
        np.broadcast_to(probabilities, (count, 40)),
        np.broadcast_to(head, (count, 4)),
        tail_uniforms(KEY, np.arange(count), uniforms_needed(spec)),
        vocab_size=40,
    )
    used = ids_NM != UNUSED_ID
    mean = np.bincount(ids_NM[used], weights_NM[used], minlength=40) / count
    expected = probabilities.copy()
    if not isinstance(spec, CountsSpec):
        expected[head] = 0.0
    # a weight is at most 1 and its variance at most its mean: five standard deviations
    np.testing.assert_allclose(mean, expected, atol=1e-9 + 5 * np.sqrt(probabilities.max() / count))
    assert (mean[expected == 0] == 0).all()


def test_stratified_samples_vary_less_than_counts_of_the_tail() -> None:
    """One token out of each part: with 4 tokens of a quarter each, every token once, always."""
    ids, weights = draw_tail_samples(
        StratifiedSpec(draws=4),
        np.full((50, 5), 0.2),
        np.zeros((50, 1), np.int32),
        tail_uniforms(KEY, np.arange(50), 4),
        vocab_size=5,
    )
    assert (ids == [1, 2, 3, 4]).all()
    np.testing.assert_allclose(weights, 0.2)


# -- form ------------------------------------------------------------------------------------------
SPECS = st.one_of(
    st.builds(StratifiedSpec, draws=st.integers(1, 6)),
    st.builds(ThresholdSpec, threshold=st.floats(1 / 1024, 0.9)),
    st.builds(CountsSpec, draws=st.integers(1, 20)),
)


@given(SPECS, st.integers(0, 2**32), st.integers(0, 3))
def test_rows_ascend_keep_to_the_tail_and_add_up(spec, seed: int, num_padded: int) -> None:
    random = np.random.default_rng(seed)
    probabilities_NV = random.dirichlet(np.full(30, 0.2), size=6)
    probabilities_NV[probabilities_NV < 1e-4] = 0.0
    probabilities_NV /= probabilities_NV.sum(axis=1, keepdims=True)
    vocab_size = 30 - num_padded
    head_NK = np.argsort(-probabilities_NV[:, :vocab_size], axis=1)[:, :3].astype(np.int32)
    head_NK[::2, 2] = UNUSED_ID
    uniforms = random.random((6, uniforms_needed(spec)))
    ids_NM, weights_NM = draw_tail_samples(
        spec, probabilities_NV, head_NK, uniforms, vocab_size=vocab_size
    )
    assert (ids_NM.dtype, weights_NM.dtype) == (np.int32, np.float32)
    rows = zip(probabilities_NV, head_NK, ids_NM, weights_NM, strict=True)
    for probabilities, head, ids, weights in rows:
        used = ids != UNUSED_ID
        ids, weights = ids[used], weights[used].astype(np.float64)
        assert (used[: len(ids)]).all()
        assert len(ids) <= spec.width
        assert (np.diff(ids) > 0).all()
        assert (ids < vocab_size).all()
        assert (probabilities[ids] > 0).all()
        live = probabilities[:vocab_size]
        if isinstance(spec, CountsSpec):
            counts = weights * spec.draws
            np.testing.assert_allclose(counts, np.rint(counts), atol=1e-5)
            assert counts.sum() <= spec.draws + 1e-4
            if num_padded == 0:
                np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
            continue
        assert not np.isin(ids, head).any()
        tail = live.copy()
        tail[head[head != UNUSED_ID]] = 0.0
        if isinstance(spec, StratifiedSpec):
            np.testing.assert_allclose(weights.sum(), tail.sum(), rtol=1e-5, atol=1e-12)
        else:
            sure = np.flatnonzero(tail >= spec.threshold)
            assert np.isin(sure, ids).all()
            expected = np.maximum(tail[ids], spec.threshold)
            np.testing.assert_allclose(weights, expected, rtol=1e-6)
            # one systematic pass: the total is off by less than one token
            assert abs(weights.sum() - tail.sum()) < spec.threshold + 1e-6


@pytest.mark.parametrize("spec", [StratifiedSpec(draws=3), ThresholdSpec(threshold=0.1)], ids=str)
def test_a_tail_of_no_mass_has_no_samples(spec: TailSampleSpec) -> None:
    ids, weights = draw_tail_samples(
        spec,
        np.array([[0.5, 0.5, 0.0]]),
        np.array([[0, 1]], np.int32),
        np.full((1, uniforms_needed(spec)), 0.5),
        vocab_size=3,
    )
    assert ids.shape == weights.shape == (1, 0)


def test_a_random_number_next_to_one_draws_the_last_token_with_mass() -> None:
    """``(j + u) / m`` rounds to one: the place is the very end of the running sum."""
    almost_one = np.full((1, 3), np.nextafter(1.0, 0.0))
    ids, _ = draw_tail_samples(
        StratifiedSpec(draws=3),
        np.array([[0.4, 0.2, 0.2, 0.2, 0.0]]),
        np.array([[0]], np.int32),
        almost_one,
        vocab_size=5,
    )
    assert ids.max() == 3


def test_rows_are_padded_to_the_longest() -> None:
    ids, weights = padded([(np.array([4]), np.array([0.5])), (np.zeros(0, np.int64), np.zeros(0))])
    assert ids.tolist() == [[4], [UNUSED_ID]]
    assert weights.tolist() == [[0.5], [0.0]]
    assert padded([])[0].shape == (0, 0)
