"""Dense labels are what their definitions say, by other means."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from storage.dense import entropy, label_sample_densely, log_power_sum, power_slope
from storage.keys import (
    CountsSpec,
    MassSpec,
    StratifiedSpec,
    ThresholdSpec,
    TopKSpec,
    sample_key,
)
from storage.labels.base import UNUSED_ID
from storage.narrow import narrow
from storage.selection import SampleRequest
from storage.testing import make_sample, make_spec

LOGITS = arrays.arrays(np.float64, (3, 7), elements=st.floats(-40.0, 40.0))
ALPHAS = st.sampled_from([0.1, 0.25, 0.5, 0.75, 2.0, 4.0])
EVERYTHING = ("entropy", "power_sum_10", "power_sum_200", "power_sum_400", "power_sums")


def log_softmax(logits_NV: np.ndarray) -> np.ndarray:
    shifted_NV = logits_NV - logits_NV.max(axis=1, keepdims=True)
    result: np.ndarray = shifted_NV - np.log(np.exp(shifted_NV).sum(axis=1, keepdims=True))
    return result


@given(LOGITS)
def test_entropy_is_its_sum(logits_NV: np.ndarray) -> None:
    logprobs_NV = log_softmax(logits_NV)
    rows = np.exp(logprobs_NV).tolist()
    expected = [math.fsum(-p * math.log(p) for p in row) for row in rows]
    np.testing.assert_allclose(entropy(logprobs_NV), expected, atol=1e-9)


@given(LOGITS, ALPHAS)
def test_a_power_sum_is_its_sum(logits_NV: np.ndarray, alpha: float) -> None:
    logprobs_NV = log_softmax(logits_NV)
    rows = np.exp(logprobs_NV).tolist()
    expected = [math.log(math.fsum(p**alpha for p in row)) for row in rows]
    np.testing.assert_allclose(log_power_sum(logprobs_NV, alpha), expected, atol=1e-9)


@given(LOGITS, ALPHAS)
def test_a_power_sum_normalises_the_distribution_at_another_temperature(
    logits_NV: np.ndarray, alpha: float
) -> None:
    """``log_softmax(logits / T)`` from log-probs at temperature 1 and the one number."""
    logprobs_NV = log_softmax(logits_NV)
    found = alpha * logprobs_NV - log_power_sum(logprobs_NV, alpha)[:, None]
    np.testing.assert_allclose(found, log_softmax(alpha * logits_NV), atol=1e-9)


@given(LOGITS, ALPHAS)
def test_a_slope_is_the_derivative_of_the_power_sum(logits_NV: np.ndarray, alpha: float) -> None:
    logprobs_NV = log_softmax(logits_NV)
    step = 1e-5
    rise = log_power_sum(logprobs_NV, alpha + step) - log_power_sum(logprobs_NV, alpha - step)
    # the third derivative is at most a cubed range of log-probs, 80 nats: 80**3 / 6 * 1e-10
    np.testing.assert_allclose(power_slope(logprobs_NV, alpha), rise / (2 * step), atol=1e-4)


def test_known_values() -> None:
    uniform = np.log(np.full((1, 16), 1 / 16))
    # sum of 16 times 16**-0.25 = 16**0.75 = 8
    np.testing.assert_allclose(log_power_sum(uniform, 0.25), np.log(8))
    np.testing.assert_allclose(power_slope(uniform, 0.25), -np.log(16))
    with np.errstate(divide="ignore"):
        certain = np.log(np.array([[1.0, 0.0, 0.0]]))
    for statistic in (log_power_sum, power_slope):
        assert statistic(certain, 0.5).tolist() == [0.0]
    assert entropy(certain).tolist() == [0.0]


# -- whole samples ---------------------------------------------------------------------------------
LOGPROBS_RV = log_softmax(np.random.default_rng(5).normal(scale=2.0, size=(6, 30)))
RESPONSE = np.array([3, 29, 0, 7, 7, 12], np.int32)


def request(mask: list[bool] | None = None, **changes: object) -> SampleRequest:
    prompt = np.array([1, 2], np.int32)
    mask_R = None if mask is None else np.array(mask)
    key = sample_key(prompt, 0, response_ids=RESPONSE, label_mask=mask_R)
    return SampleRequest(key, 0, prompt, RESPONSE, (), label_mask_R=mask_R, **changes)


def spec_of(**changes: object):
    spec = make_spec(vocab_size=30, **changes)
    generation = spec.generation.model_copy(update={"mode": "score", "sampling": None})
    return spec.model_copy(update={"generation": generation})


@pytest.mark.parametrize("kind", [TopKSpec(k=4), MassSpec(mass=0.6, cap=6)], ids=str)
@pytest.mark.parametrize(
    "sampled",
    [StratifiedSpec(draws=3), ThresholdSpec(threshold=0.05), CountsSpec(draws=9)],
    ids=str,
)
def test_every_column_of_a_sample_is_that_of_its_rows(kind, sampled) -> None:
    spec = spec_of(kind=kind, columns=(*EVERYTHING, sampled))
    sample = label_sample_densely(request(), RESPONSE, LOGPROBS_RV, spec)
    sample.check(spec)
    for name, alpha in (("10", 0.1), ("200", 2.0), ("400", 4.0)):
        np.testing.assert_allclose(
            sample.optional[f"log_power_sum_{name}"], log_power_sum(LOGPROBS_RV, alpha), rtol=1e-6
        )
    for name, alpha in (("25", 0.25), ("50", 0.5), ("75", 0.75)):
        np.testing.assert_allclose(
            sample.optional[f"log_power_sum_{name}"], log_power_sum(LOGPROBS_RV, alpha), rtol=1e-6
        )
        np.testing.assert_allclose(
            sample.optional[f"power_slope_{name}"], power_slope(LOGPROBS_RV, alpha), rtol=1e-6
        )
    kept = np.where(sample.topk_ids_NK == UNUSED_ID, 0.0, np.exp(sample.topk_logprobs_NK))
    np.testing.assert_allclose(
        np.exp(sample.log_tail_mass_N), 1 - kept.sum(axis=1), rtol=1e-4, atol=1e-6
    )


def test_heads_of_adaptive_k_are_those_that_narrowing_makes() -> None:
    wide = label_sample_densely(request(), RESPONSE, LOGPROBS_RV, spec_of(k=6))
    spec = spec_of(kind=MassSpec(mass=0.6, cap=6))
    direct, narrowed = (
        label_sample_densely(request(), RESPONSE, LOGPROBS_RV, spec),
        narrow(wide, spec),
    )
    np.testing.assert_array_equal(direct.topk_ids_NK, narrowed.topk_ids_NK)
    np.testing.assert_array_equal(direct.topk_logprobs_NK, narrowed.topk_logprobs_NK)
    np.testing.assert_allclose(direct.log_tail_mass_N, narrowed.log_tail_mass_N, rtol=1e-5)


def test_a_mask_leaves_the_rows_that_it_names_as_they_are() -> None:
    spec = spec_of(columns=EVERYTHING)
    whole = label_sample_densely(request(), RESPONSE, LOGPROBS_RV, spec)
    mask = [False, True, False, False, True, True]
    part = label_sample_densely(request(mask), RESPONSE, LOGPROBS_RV, spec)
    part.check(spec)
    assert part.positions_N.tolist() == [1, 4, 5]
    np.testing.assert_array_equal(part.topk_ids_NK, whole.topk_ids_NK[[1, 4, 5]])
    np.testing.assert_array_equal(part.token_logprob_N, whole.token_logprob_N[[1, 4, 5]])
    for name, values in part.optional.items():
        np.testing.assert_array_equal(values, whole.optional[name][[1, 4, 5]])


def test_the_padding_of_the_vocabulary_counts_and_is_never_named() -> None:
    """The likeliest row of the output layer is padding: in the tail and the sums, nowhere else."""
    logprobs_RV = LOGPROBS_RV.copy()
    logprobs_RV[:, 28] = logprobs_RV.max(axis=1) + 1.0
    logprobs_RV = log_softmax(logprobs_RV)
    response = np.minimum(RESPONSE, 26)
    key = sample_key([1, 2], 0, response_ids=response)
    asked = SampleRequest(key, 0, np.array([1, 2], np.int32), response, ())
    spec = spec_of(k=4, columns=(*EVERYTHING, CountsSpec(draws=50)))
    spec = spec.model_copy(update={"vocab_size": 27})
    sample = label_sample_densely(asked, response, logprobs_RV, spec)
    sample.check(spec)
    np.testing.assert_allclose(sample.entropy_N, entropy(logprobs_RV), rtol=1e-6)
    assert sample.topk_ids_NK.max() < 27
    assert sample.optional["tail_ids"].max() < 27
    assert (np.exp(sample.log_tail_mass_N) > np.exp(logprobs_RV[:, 28])).all()
    assert (sample.optional["tail_weights"].sum(axis=1) < 1).all()
    likelier = (logprobs_RV[:, :27] > logprobs_RV[np.arange(6), response][:, None]).sum(axis=1)
    np.testing.assert_array_equal(sample.token_rank_N, 1 + likelier)


def test_a_known_response_ends_as_its_request_says() -> None:
    known = request(finish_reason="stop", stop_reason="\n\n")
    sample = label_sample_densely(known, RESPONSE, LOGPROBS_RV, spec_of())
    assert (sample.finish_reason, sample.stop_reason) == ("stop", "\n\n")
    plain = label_sample_densely(request(), RESPONSE, LOGPROBS_RV, spec_of())
    assert (plain.finish_reason, plain.stop_reason) == ("given", None)
    answer = SampleRequest("k", 0, np.array([1], np.int32), None, ())
    ended = label_sample_densely(
        answer,
        RESPONSE,
        LOGPROBS_RV,
        make_spec(vocab_size=30),
        finish_reason="stop",
        stop_reason="x",
    )
    assert (ended.finish_reason, ended.stop_reason) == ("stop", "x")


def test_the_labels_of_the_tests_have_the_columns_of_their_request() -> None:
    spec = make_spec(columns=("power_sums", ThresholdSpec(threshold=0.1)))
    sample = make_sample(3, spec)
    sample.check(spec)
    assert sample.entropy_N is None
    assert sorted(sample.optional) == sorted(
        [f"{kind}_{n}" for kind in ("log_power_sum", "power_slope") for n in (25, 50, 75)]
        + ["tail_ids", "tail_weights"]
    )
