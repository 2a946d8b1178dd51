"""Tail arithmetic agrees with high precision where the obvious formula cancels."""

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from storage.tail import (
    LOG_ZERO,
    log1mexp,
    log_tail_mass_of,
    logsumexp,
    normalized_categories,
)

ROWS = arrays.arrays(np.float64, (3, 5), elements=st.floats(-90.0, 0.0))


@given(ROWS, st.floats(-500.0, 500.0))
def test_logsumexp_moves_with_a_constant(values_NK: np.ndarray, constant: float) -> None:
    moved = logsumexp(values_NK + constant)
    np.testing.assert_allclose(moved, logsumexp(values_NK) + constant, atol=1e-9)


def test_logsumexp_of_equal_values_is_the_value_plus_log_k() -> None:
    np.testing.assert_allclose(logsumexp(np.full((1, 8), -1000.0)), -1000.0 + math.log(8))


@pytest.mark.parametrize("x", [-1e-12, -1e-6, -0.1, -math.log(2.0), -0.7, -5.0, -30.0, -90.0])
def test_log1mexp_equals_exact_arithmetic(x: float) -> None:
    getcontext().prec = 80
    expected = float((1 - Decimal(x).exp()).ln())
    np.testing.assert_allclose(log1mexp(np.array([x])), expected, rtol=1e-13)


def test_log1mexp_is_minus_infinity_at_zero_and_for_mass_above_one() -> None:
    assert log1mexp(np.array([0.0, 1e-7])).tolist() == [-math.inf, -math.inf]


def test_the_derived_tail_is_what_the_top_k_leaves() -> None:
    # 1 - (0.5 + 0.25) = 0.25
    found = log_tail_mass_of(np.log(np.array([[0.5, 0.25]])))
    np.testing.assert_allclose(found, math.log(0.25))


def test_a_full_top_k_leaves_the_stored_form_of_zero() -> None:
    assert log_tail_mass_of(np.log(np.array([[0.5, 0.5]]))).tolist() == [LOG_ZERO]


@given(ROWS, arrays.arrays(np.float64, 3, elements=st.floats(LOG_ZERO, 0.0)))
def test_categories_sum_to_one_and_keep_their_ratios(
    logprobs_NK: np.ndarray, tail_N: np.ndarray
) -> None:
    categories = normalized_categories(logprobs_NK, tail_N)
    assert categories.shape == (3, 6)
    np.testing.assert_allclose(np.exp(categories).sum(axis=1), 1.0, rtol=1e-12)
    shift_N = categories[:, -1] - tail_N
    # a sum of numbers near 100 in float64 is exact to 100 * 2**-52 = 2e-14
    np.testing.assert_allclose(categories[:, :-1] - logprobs_NK - shift_N[:, None], 0, atol=1e-13)


def test_float32_input_is_computed_in_float64() -> None:
    categories = normalized_categories(
        np.array([[-0.5, -1.5]], dtype=np.float32), np.array([-2.0], dtype=np.float32)
    )
    assert categories.dtype == np.float64
