"""A temperature is found in any noise, and noise is not taken for one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.sharpness import SMALLEST, Slope, sharpness_of, slope_of
from storage.tail import logsumexp

N, K = 60, 12


def logprobs(seed: int, *, used: int = K) -> np.ndarray:
    values_NK = np.random.default_rng(seed).normal(scale=2.0, size=(N, K))
    values_NK[:, used:] = -np.inf
    result: np.ndarray = values_NK - logsumexp(values_NK)[:, None]
    return result


def off(values_NK: np.ndarray, seed: int, nats: float) -> np.ndarray:
    random = np.random.default_rng([7, seed])  # not the numbers that made the values
    result: np.ndarray = values_NK + random.normal(scale=nats, size=values_NK.shape)
    return result


@given(st.floats(0.2, 5.0), st.integers(0, 1000), st.integers(2, K))
def test_the_slope_is_the_inverse_temperature(temperature: float, seed: int, used: int) -> None:
    """Whatever the normaliser of the tempered rows is."""
    recomputed = logprobs(seed, used=used)
    given_NK = recomputed / temperature
    given_NK -= logsumexp(given_NK)[:, None]
    found = slope_of(given_NK, recomputed)
    assert found.value == pytest.approx(1 / temperature)
    assert found.standard_error == pytest.approx(0, abs=1e-9)


def test_the_standard_error_is_the_spread_of_the_slope() -> None:
    """Over 300 draws of the noise."""
    recomputed = logprobs(0)
    slopes = [slope_of(off(recomputed, seed, 0.2), recomputed) for seed in range(300)]
    spread = np.std([slope.value for slope in slopes])
    errors = [slope.standard_error for slope in slopes]
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)
    assert np.mean([slope.value for slope in slopes]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("row", [[0.0], [np.log(0.5), np.log(0.5)]], ids=["one id", "equal"])
def test_rows_that_cannot_be_sharper_say_nothing(row: list[float]) -> None:
    rows_NK = np.tile(row, (3, 1))
    silent = slope_of(rows_NK, rows_NK)
    assert silent == Slope(1.0, 0.0, 0.0)
    found = sharpness_of([silent], [], ["a"], noise_factor=2.0)
    assert (found.value, found.limit, found.reasons()) == (1.0, SMALLEST, [])


def slopes(nats: float, *, seed: int = 0, sharper: float = 1.0, only: int = -1) -> list[Slope]:
    made = []
    for number in range(16):
        recomputed = logprobs(number)
        given_NK = off(recomputed, 1000 * seed + number, nats)
        made.append(slope_of(given_NK * (sharper if only in (-1, number) else 1.0), recomputed))
    return made


KEYS = [f"sample{number}" for number in range(16)]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_taken_for_a_temperature(seed: int) -> None:
    noise = slopes(0.1, seed=seed + 100)
    found = sharpness_of(slopes(0.1, seed=seed), noise, KEYS, noise_factor=2.0)
    assert found.reasons() == []


@pytest.mark.parametrize("sharper", [0.93, 1.07])
def test_a_temperature_of_all_samples_is_refused(sharper: float) -> None:
    found = sharpness_of(slopes(0.1, sharper=sharper), slopes(0.1, seed=1), KEYS, noise_factor=2.0)
    assert found.value == pytest.approx(sharper, abs=0.01)
    assert found.reasons()[0].startswith(f"the stored distributions are {found.value:.3f} times")


@pytest.mark.parametrize("sharper", [0.85, 1.15])
def test_a_temperature_of_one_sample_is_refused(sharper: float) -> None:
    one = slopes(0.05, sharper=sharper, only=5)
    found = sharpness_of(one, slopes(0.05, seed=1), KEYS, noise_factor=2.0)
    assert found.worst_sample == "sample5"
    (reason,) = found.reasons()
    assert reason.startswith("those of sample sample5 are")


def test_labels_without_spread_are_refused() -> None:
    """All stored ids equally likely: a sharpness of 0."""
    recomputed = logprobs(0)
    flat = slope_of(np.full_like(recomputed, -np.log(K)), recomputed)
    found = sharpness_of([flat], [], ["a"], noise_factor=2.0)
    assert found.value == pytest.approx(0, abs=1e-12)
    assert len(found.reasons()) == 2
