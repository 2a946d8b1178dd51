"""Whether tokens follow stored distributions: exact under every limit, blind to nothing gross."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.drawing import (
    MIN_ROWS,
    NUM_BINS,
    Drawing,
    DrawingTest,
    _transformed,
    categories,
    chi_square_survival,
)
from storage.keys import SamplingSpec, sample_key
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.tail import logsumexp
from storage.testing import label_sample_densely, make_spec

VOCAB_SIZE, K = 30, 6
SPEC = make_spec(k=K, vocab_size=VOCAB_SIZE)
Draw = Callable[[np.ndarray, np.random.Generator], int]


def sampling(**changes: Any) -> SamplingSpec:
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return SamplingSpec.model_validate(
        {**plain, "max_tokens": 99, "stop": (), "seed": 0, **changes}
    )


def allowed(logprobs_V: np.ndarray, settings: SamplingSpec) -> np.ndarray:
    """The probabilities with which vLLM draws: temperature, min_p, top_k, top_p; float64[V]."""
    p_V = np.exp(logprobs_V / settings.temperature)
    p_V /= p_V.sum()
    p_V[p_V < settings.min_p * p_V.max()] = 0
    if settings.top_k:
        p_V[np.argsort(-p_V, kind="stable")[settings.top_k :]] = 0
    p_V /= p_V.sum()
    order = np.argsort(-p_V, kind="stable")
    before_V = np.cumsum(p_V[order]) - p_V[order]
    p_V[order[before_V >= settings.top_p]] = 0
    result: np.ndarray = p_V / p_V.sum()
    return result


def sample(number: int, settings: SamplingSpec, num_tokens: int = 50) -> LabelledSample:
    """Independent rows over 30 ids, tokens drawn as the settings say; log-probs as stored."""
    random = np.random.default_rng(number)
    logits_RV = random.normal(scale=2.0, size=(num_tokens, VOCAB_SIZE))
    rows_RV = logits_RV - logsumexp(logits_RV)[:, None]
    response = [random.choice(VOCAB_SIZE, p=allowed(row, settings)) for row in rows_RV]
    prompt = np.array([number, 1], np.int32)
    request = SampleRequest(sample_key(prompt, 0), 0, prompt, None, ())
    made = label_sample_densely(request, np.array(response, np.int32), rows_RV, SPEC)
    stored = np.rint(made.topk_logprobs_NK * 256) / 256
    return replace(made, topk_logprobs_NK=stored.astype(np.float32))


def outcome(*samples: LabelledSample, settings: SamplingSpec | None, padding: float = 0) -> Drawing:
    test = DrawingTest(settings, padding_mass=padding)
    for one in samples:
        test.add(one)
    return test.result()


LIMITS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 3},
    {"top_k": 20},
    {"min_p": 0.1},
    {"top_p": 0.7},
    {"top_p": 0.99},
    {"temperature": 1.3, "min_p": 0.02, "top_k": 5, "top_p": 0.9},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_categories_are_the_probabilities_of_drawing(limits: dict[str, Any]) -> None:
    """Given that the token falls into them, by the dense probabilities of the sampler."""
    settings = sampling(**limits)
    one = sample(0, settings)
    random = np.random.default_rng(0)
    logits_RV = random.normal(scale=2.0, size=(50, VOCAB_SIZE))
    found = categories(one, settings, with_tail=False)
    stated_NC = np.exp(found.log_weights_NC - logsumexp(found.log_weights_NC)[:, None])
    for row, logits_V in enumerate(logits_RV):
        drawn_C = allowed(logits_V - logsumexp(logits_V[None]), settings)[one.topk_ids_NK[row]]
        drawn_C = np.where(stated_NC[row] > 0, drawn_C, 0)
        np.testing.assert_allclose(stated_NC[row], drawn_C / drawn_C.sum(), atol=2e-3)
    assert not found.impossible_N.any()
    places_M = found.place_N[found.place_N >= 0]
    ids_M = one.topk_ids_NK[found.place_N >= 0, places_M]
    np.testing.assert_array_equal(ids_M, one.token_ids_N[found.place_N >= 0])


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_correct_tokens_pass(limits: dict[str, Any]) -> None:
    settings = sampling(**limits)
    for start in (0, 100, 200):
        found = outcome(*(sample(start + n, settings) for n in range(20)), settings=settings)
        assert found.reasons(1e-4) == []
        assert found.method == "chi_square"
        assert (found.num_samples, found.num_rows) == (20, 1000)
        assert found.tested_rows > 500


def test_p_values_of_correct_tokens_are_uniform() -> None:
    """100 sets of 300 rows; each tenth of [0, 1] expects 10 with a standard deviation of 3."""
    settings = sampling()
    p_values = [
        outcome(*(sample(6 * number + n, settings) for n in range(6)), settings=settings).p_value
        for number in range(100)
    ]
    counts, _ = np.histogram(np.array(p_values, float), bins=10, range=(0, 1))
    assert counts.min() >= 1
    assert counts.max() <= 22


def test_evidence_against_correct_tokens_is_as_rare_as_it_says() -> None:
    """At most one in e**2 = 7.4 sets may reach 2 nats (Ville's inequality): 27 of 200."""
    settings = sampling()
    strong = sum(
        (outcome(sample(number, settings), settings=settings).log_evidence or 0) >= 2
        for number in range(200)
    )
    assert strong <= 27


@pytest.mark.parametrize(
    ("drawn", "stated"),
    [
        ({"temperature": 0.9}, {}),
        ({"temperature": 1.1}, {}),
        ({"top_p": 0.8}, {}),
        ({"top_k": 6}, {}),
        ({}, {"top_p": 0.8}),
        ({"temperature": 0.5}, {"temperature": 0.7}),
        ({"top_p": 0.5}, {"top_p": 0.9}),
    ],
    ids=str,
)
def test_tokens_drawn_with_other_settings_are_refused(
    drawn: dict[str, Any], stated: dict[str, Any]
) -> None:
    samples = [sample(number, sampling(**drawn)) for number in range(120)]
    assert outcome(*samples, settings=sampling(**stated)).reasons(1e-6) != []


def test_one_sample_with_the_likeliest_tokens_is_found_among_many() -> None:
    settings = sampling()
    samples = [sample(number, settings) for number in range(40)]
    greedy = samples[7].topk_ids_NK[:, 0]
    samples[7] = replace(samples[7], response_ids_R=greedy)
    found = outcome(*samples, settings=settings)
    assert found.worst_sample == samples[7].key
    assert any(samples[7].key in reason for reason in found.reasons(1e-6))


def test_few_rows_get_no_chi_square_but_evidence_counts() -> None:
    greedy = sample(0, sampling(), num_tokens=90)
    greedy = replace(greedy, response_ids_R=greedy.topk_ids_NK[:, 0])
    found = outcome(greedy, settings=sampling())
    assert found.num_rows == 90 < MIN_ROWS
    assert (found.chi_square, found.p_value) == (None, None)
    assert len(found.reasons(1e-6)) == 1


def test_the_tail_is_tested_like_a_token_unless_part_of_it_is_padding() -> None:
    one = sample(0, sampling())
    in_tail_N = ~(one.topk_ids_NK == one.token_ids_N[:, None]).any(axis=1)
    assert 0 < in_tail_N.sum() < 50
    with_tail = categories(one, sampling(), with_tail=True)
    np.testing.assert_array_equal(with_tail.place_N == K, in_tail_N)
    np.testing.assert_allclose(logsumexp(with_tail.log_weights_NC), 0, atol=2e-3)
    assert outcome(one, settings=sampling(), padding=1e-6).tested_rows == 50
    assert outcome(one, settings=sampling(), padding=1e-3).tested_rows == 50 - in_tail_N.sum()


def test_given_responses_are_not_tested() -> None:
    found = outcome(sample(0, sampling()), settings=None)
    assert (found.method, found.tested_rows, found.log_evidence) == ("given", 0, None)
    assert found.reasons(1e-6) == []


def test_greedy_tokens_must_be_the_likeliest() -> None:
    drawn = sample(0, sampling())
    found = outcome(drawn, settings=sampling(temperature=0.0))
    assert found.impossible_rows == (drawn.token_rank_N > 1).sum() > 0
    (reason,) = found.reasons(1e-6)
    assert f"{found.impossible_rows} of 50 rows is not the likeliest" in reason


def test_a_tie_for_the_likeliest_may_be_broken_either_way() -> None:
    one = sample(0, sampling(), num_tokens=1)
    top = one.topk_logprobs_NK.copy()
    top[:, 1] = top[:, 0]
    tied = replace(
        one,
        response_ids_R=one.topk_ids_NK[:, 1],
        topk_logprobs_NK=top,
        token_logprob_N=top[:, 0],
        token_rank_N=np.array([2], np.int32),
    )
    assert outcome(tied, settings=sampling(temperature=0.0)).impossible_rows == 0


def test_the_transform_can_be_computed_again() -> None:
    """Its random part depends on the sample alone, and it stays within the token's category."""
    found = categories(sample(3, sampling()), sampling(), with_tail=True)
    one = _transformed(found.log_weights_NC, found.place_N, key="a" * 32)
    np.testing.assert_array_equal(
        one, _transformed(found.log_weights_NC, found.place_N, key="a" * 32)
    )
    other = _transformed(found.log_weights_NC, found.place_N, key="b" * 32)
    assert (one != other).all()
    p_NC = np.exp(found.log_weights_NC - logsumexp(found.log_weights_NC)[:, None])
    upper_N = np.cumsum(p_NC, axis=1)[np.arange(50), found.place_N]
    assert (one <= upper_N).all()
    assert (one >= upper_N - p_NC[np.arange(50), found.place_N] - 1e-12).all()


# -- the chi-square distribution ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("statistic", "degrees", "expected"),
    [
        # tabulated critical values: Abramowitz and Stegun, table 26.8
        (3.84146, 1, 0.05),
        (5.99146, 2, 0.05),
        (6.63490, 1, 0.01),
        (30.1435, 19, 0.05),
        (36.1908, 19, 0.01),
        (43.8202, 19, 0.001),
        (31.4104, 20, 0.05),
        (0.0, 19, 1.0),
    ],
)
def test_survival_equals_the_tables(statistic: float, degrees: int, expected: float) -> None:
    assert chi_square_survival(statistic, degrees) == pytest.approx(expected, rel=5e-5)


@given(st.floats(1e-3, 300), st.integers(3, 60))
def test_survival_equals_the_integral_of_the_density(statistic: float, degrees: int) -> None:
    edges = np.linspace(0, statistic, 20_001)
    x = (edges[1:] + edges[:-1]) / 2
    log_density = (degrees / 2 - 1) * np.log(x) - x / 2 - degrees / 2 * math.log(2)
    below = np.exp(log_density - math.lgamma(degrees / 2)).sum() * (edges[1] - edges[0])
    assert chi_square_survival(statistic, degrees) == pytest.approx(1 - below, abs=1e-4)


def test_a_huge_statistic_has_no_probability_left() -> None:
    assert chi_square_survival(1e5, NUM_BINS - 1) == 0.0
