"""Limits of agreement: each number of a row is compared, in nats, against the right yardstick."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.agreement import (
    LOWEST_NATS,
    Agreement,
    DenseRows,
    Difference,
    Limits,
    Recomputed,
    RowNumbers,
    compare,
    joined,
)
from storage.columns import scalar_columns
from storage.keys import LabelSetSpec, MassSpec, TopKSpec
from storage.samples import ROUNDING_NATS, LabelledSample
from storage.testing import make_sample, make_spec

SPEC = make_spec(
    columns=("entropy", "power_sum_10", "power_sum_200", "power_sum_400", "power_sums")
)
LIMITS = Limits(float32=1e-4, noise_factor=2.0, max_kl=0.1, vocab_size=100, roundoff=0.0)
NUM_SAMPLES, NUM_TOKENS = 16, 40


def exact_rows(sample: LabelledSample, spec: LabelSetSpec = SPEC) -> DenseRows:
    """What a recomputation says that agrees with the sample to the last bit."""
    return DenseRows(
        logprobs_NK=sample.topk_logprobs_NK.astype(np.float64),
        log_tail_mass_N=sample.log_tail_mass_N.astype(np.float64),
        token_logprob_N=sample.token_logprob_N.astype(np.float64),
        scalars={n: sample.optional[n].astype(np.float64) for n in scalar_columns(spec.columns)},
        top_ids_NK=sample.topk_ids_NK,
        rank_gap_N=np.zeros(len(sample.positions_N)),
        head_gaps=(np.zeros(len(sample.positions_N)),) * 2,
        padding_mass_N=np.zeros(len(sample.positions_N)),
    )


def noisy(rows: DenseRows, seed: int, nats: float) -> DenseRows:
    """The numbers of another implementation: every one a little off."""
    random = np.random.default_rng(seed)

    def off(values: np.ndarray) -> np.ndarray:
        result: np.ndarray = values + random.normal(scale=nats, size=values.shape)
        return result

    # a change of the normaliser moves everything of a row, as in a real model
    return replace(
        rows,
        logprobs_NK=off(rows.logprobs_NK),
        log_tail_mass_N=off(rows.log_tail_mass_N),
        token_logprob_N=off(rows.token_logprob_N),
        scalars={name: off(values) for name, values in rows.scalars.items()},
        rank_gap_N=np.abs(off(rows.rank_gap_N)),
        head_gaps=tuple(np.abs(off(gap_N)) for gap_N in rows.head_gaps),
    )


def as_stored(sample: LabelledSample, rows: RowNumbers) -> LabelledSample:
    """The sample with the numbers of a recomputation."""
    return replace(
        sample,
        topk_logprobs_NK=rows.logprobs_NK.astype(np.float32),
        log_tail_mass_N=rows.log_tail_mass_N.astype(np.float32),
        token_logprob_N=rows.token_logprob_N.astype(np.float32),
        optional={name: values.astype(np.float32) for name, values in rows.scalars.items()},
    )


def samples() -> list[LabelledSample]:
    return [make_sample(number, SPEC, num_tokens=NUM_TOKENS) for number in range(NUM_SAMPLES)]


def in_float32(change: Callable[[DenseRows], DenseRows] = lambda rows: rows) -> Agreement:
    """The agreement of correct labels with a recomputation of which one sample is changed."""
    rows = [Recomputed(sample, exact_rows(sample), None) for sample in samples()]
    rows[3] = replace(rows[3], exact=change(rows[3].exact))
    return compare(rows, SPEC, LIMITS)


def with_noise(
    stored_nats: float, rough_nats: float, change: Callable[[LabelledSample], LabelledSample]
) -> Agreement:
    """Labels and their recomputation in a short dtype, both off from float32."""
    rows = []
    for number, sample in enumerate(samples()):
        exact = exact_rows(sample)
        engine = noisy(exact, 2 * number, stored_nats)
        rough = noisy(exact, 2 * number + 1, rough_nats)
        exact = replace(
            exact,
            rank_gap_N=engine.rank_gap_N / 10,
            head_gaps=(engine.head_gaps[0], rough.head_gaps[1]),
        )
        rows.append(Recomputed(change(as_stored(sample, engine)), exact, rough))
    return compare(rows, SPEC, LIMITS)


# -- float32 --------------------------------------------------------------------------------------
def test_equal_labels_differ_in_nothing() -> None:
    found = in_float32()
    assert found.reasons() == []
    assert all(difference.max < 1e-6 for difference in found.differences.values())
    assert found.sharpness.value == pytest.approx(1, abs=1e-6)
    assert (found.head_overlap, found.argmax_agreement) == (1.0, 1.0)
    assert found.num_rows == NUM_SAMPLES * NUM_TOKENS
    assert set(found.differences) == {
        *("logprob", "token_logprob", "token_rank", "log_tail_mass", "entropy", "head_gap"),
        *("log_power_sum_10", "log_power_sum_25", "log_power_sum_50", "log_power_sum_75"),
        *("log_power_sum_200", "log_power_sum_400"),
        *("power_slope_25", "power_slope_50", "power_slope_75", "kl", "reverse_kl"),
    }


def shifted(name: str, relative: float) -> Callable[[DenseRows], DenseRows]:
    """One row of one number is off, in proportion to one more than its size."""

    def change(rows: DenseRows) -> DenseRows:
        if name in rows.scalars:
            values = rows.scalars[name].copy()
            values[7] += relative * (1 + abs(values[7]))
            return replace(rows, scalars={**rows.scalars, name: values})
        if name == "head_gaps":
            gap_N = rows.head_gaps[0].copy()
            gap_N[7] = relative * (1 - rows.logprobs_NK[7].min())
            return replace(rows, head_gaps=(gap_N, *rows.head_gaps[1:]))
        values = getattr(rows, name).copy()
        place = (7, 2) if values.ndim == 2 else 7
        size = rows.token_logprob_N[7] if name == "rank_gap_N" else values[place]
        rounding = ROUNDING_NATS if name == "logprobs_NK" else 0.0
        values[place] += relative * (1 + abs(size)) + rounding
        return replace(rows, **{name: values})

    return change


@pytest.mark.parametrize(
    ("name", "number", "limit"),
    [
        ("logprobs_NK", "logprob", 1e-4),  # beside the rounding of what is stored
        ("token_logprob_N", "token_logprob", 1e-4),
        ("log_tail_mass_N", "log_tail_mass", 1e-4),
        # two tokens change places if both are off by 1e-4
        ("rank_gap_N", "token_rank", 2e-4),
        ("head_gaps", "head_gap", 2e-4),
        ("entropy", "entropy", 1e-4),
        ("power_slope_50", "power_slope_50", 1e-4),
        ("log_power_sum_10", "log_power_sum_10", 1e-4),
    ],
)
def test_one_wrong_number_of_one_row_is_refused(name: str, number: str, limit: float) -> None:
    assert in_float32(shifted(name, 0.9 * limit)).reasons() == []
    found = in_float32(shifted(name, 1.1 * limit))
    assert found.differences[number].max == pytest.approx(1.1 * limit, rel=0.02)
    assert any(reason.startswith(f"{number} differs") for reason in found.reasons())


def test_a_tail_below_the_floor_counts_by_its_size_alone() -> None:
    """A tail of 1e-14 or of nothing: the same to 1e-4 of the floor of 1e-12, or 1e-16."""
    one = samples()[0]
    one = replace(one, log_tail_mass_N=np.full(NUM_TOKENS, -32.2, np.float32))
    exact = replace(exact_rows(one), log_tail_mass_N=np.full(NUM_TOKENS, -100.0))
    found = compare([Recomputed(one, exact, None)], SPEC, LIMITS).differences
    expected = math.log1p(math.exp(-32.2) / 1e-12) / (1 + math.log(1e12))
    assert found["log_tail_mass"].max == pytest.approx(expected, rel=1e-5)
    derived = SPEC.model_copy(update={"tail": "topk"})
    found = compare([Recomputed(one, exact, None)], derived, LIMITS).differences
    assert found["log_tail_mass"].max < 1e-10


def test_a_log_prob_below_what_can_be_stored_is_the_lowest_one() -> None:
    one = samples()[0]
    stored = one.topk_logprobs_NK.copy()
    stored[:, -1] = LOWEST_NATS
    exact = exact_rows(one)
    exact.logprobs_NK[:, -1] = -700.0
    found = compare([Recomputed(replace(one, topk_logprobs_NK=stored), exact, None)], SPEC, LIMITS)
    assert found.differences["logprob"].max < 1e-6


@given(st.integers(0, 2**32 - 1), st.sampled_from([TopKSpec(k=8), MassSpec(mass=0.9, cap=8)]))
def test_rounding_alone_keeps_every_limit(seed: int, kind: TopKSpec | MassSpec) -> None:
    """Also for the KL, although every log-prob is off by all that is allowed."""
    spec = make_spec(kind=kind)
    one = make_sample(seed, spec)
    random = np.random.default_rng(seed)
    exact = exact_rows(one, spec)
    signs_NK = random.choice([-1.0, 1.0], size=one.topk_logprobs_NK.shape)
    sizes_NK = ROUNDING_NATS + 0.99e-4 * (1 + np.abs(exact.logprobs_NK))
    off_NK = np.where(np.isfinite(exact.logprobs_NK), signs_NK * sizes_NK, 0.0)
    exact = replace(exact, logprobs_NK=exact.logprobs_NK + off_NK)
    found = compare([Recomputed(one, exact, None)], spec, LIMITS)
    assert found.reasons() == []
    assert found.differences["kl"].max > ROUNDING_NATS**2 / 100


# -- shorter dtypes -------------------------------------------------------------------------------
def same(sample: LabelledSample) -> LabelledSample:
    return sample


@pytest.mark.parametrize("nats", [0.005, 0.05])
def test_labels_as_noisy_as_the_reference_are_fit(nats: float) -> None:
    found = with_noise(nats, nats, same)
    assert found.reasons() == []
    logprob = found.differences["logprob"]
    assert logprob.typical_noise is not None
    assert logprob.typical == pytest.approx(logprob.typical_noise, rel=0.1)
    # log-probs of 8 out of 100 ids lie around 3 nats: a quarter of the noise remains
    assert logprob.typical == pytest.approx(nats / 4, rel=0.5)


def test_labels_in_float32_of_a_noisy_reference_are_fit() -> None:
    assert with_noise(0.0, 0.05, same).reasons() == []


@pytest.mark.parametrize(("factor", "is_fit"), [(1.5, True), (4.0, False)])
def test_labels_much_noisier_than_the_reference_are_refused(factor: float, is_fit: bool) -> None:
    """Allowed is 2 * (1 + 8 / sqrt(640)) = 2.6 times the noise."""
    found = with_noise(factor * 0.03, 0.03, same)
    assert (found.reasons() == []) == is_fit
    if not is_fit:
        numbers = {reason.split()[0] for reason in found.reasons()}
        assert {"logprob", "token_logprob", "log_tail_mass", "entropy", "kl"} <= numbers


def test_one_strange_row_is_refused_although_the_rest_is_fine() -> None:
    """One error of 0.5 in 640 rows adds 0.02 to the root mean square, and stands out by itself."""
    first = samples()[0].key

    def change(sample: LabelledSample) -> LabelledSample:
        if sample.key != first:
            return sample
        entropy_N = sample.optional["entropy"].copy()
        entropy_N[0] += 0.5 * (1 + entropy_N[0])
        return replace(sample, optional={**sample.optional, "entropy": entropy_N})

    (reason,) = with_noise(0.05, 0.05, change).reasons()
    assert reason.startswith("entropy differs from the teacher's: 0.")
    assert "occurs" in reason


def test_one_sample_at_another_temperature_is_named() -> None:
    key = samples()[5].key

    def change(sample: LabelledSample) -> LabelledSample:
        factor = np.float32(1.3 if sample.key == key else 1.0)
        return replace(sample, topk_logprobs_NK=factor * sample.topk_logprobs_NK)

    found = with_noise(0.03, 0.03, change)
    assert found.worst_sample == key
    assert any(f"sample {key} differs from the teacher" in reason for reason in found.reasons())


@pytest.mark.parametrize(("sharpness", "is_fit"), [(1.01, True), (1.06, False), (0.94, False)])
def test_a_common_temperature_is_refused_below_the_noise(sharpness: float, is_fit: bool) -> None:
    """Its KL hides behind the noise, its direction does not."""

    def change(sample: LabelledSample) -> LabelledSample:
        mean_N1 = sample.topk_logprobs_NK.mean(axis=1, keepdims=True)
        sharper_NK = mean_N1 + np.float32(sharpness) * (sample.topk_logprobs_NK - mean_N1)
        return replace(sample, topk_logprobs_NK=sharper_NK)

    found = with_noise(0.1, 0.1, change)
    assert found.sharpness.value == pytest.approx(sharpness, abs=0.01)
    assert any("times as sharp" in reason for reason in found.reasons()) != is_fit


def test_noise_below_the_roundoff_of_the_dtype_is_luck() -> None:
    """Labels are off by the roundoff, the reference happens to be right in its single row."""
    one = make_sample(0, SPEC, num_tokens=1)
    exact = exact_rows(one)
    entropy_N = one.optional["entropy"] * np.float32(1 + 2**-8)
    stored = replace(one, optional={**one.optional, "entropy": entropy_N})
    rows = [Recomputed(stored, exact, exact)]
    assert compare(rows, SPEC, LIMITS).reasons() != []
    assert compare(rows, SPEC, replace(LIMITS, roundoff=2**-8)).reasons() == []


def test_noise_does_not_excuse_everything() -> None:
    """A dtype in which the model falls apart: KL 0.3 nats, as much as its reference has."""
    found = with_noise(0.9, 0.9, same)
    assert found.worst_sample_limit == LIMITS.max_kl
    assert any("allowed is 0.1" in reason for reason in found.reasons())


def test_numbers_that_are_no_numbers_are_refused() -> None:
    """A comparison with NaN is false, whichever way round; this one must not pass."""
    good: dict[str, Any] = {"mean": 0.0, "p99": 0.0, "typical_noise": 0.1, "max_noise": 0.1}
    limits = {"typical_limit": 1.0, "max_limit": 1.0}
    assert Difference(**good, **limits, typical=0.5, max=0.5).problem() is None
    assert Difference(**good, **limits, typical=math.nan, max=0.5).problem() is not None
    assert Difference(**good, **limits, typical=0.5, max=math.nan).problem() is not None


def test_joined_rows_are_the_rows_one_after_the_other() -> None:
    rows = exact_rows(samples()[0])

    def part(where: slice) -> DenseRows:
        return DenseRows(
            logprobs_NK=rows.logprobs_NK[where],
            log_tail_mass_N=rows.log_tail_mass_N[where],
            token_logprob_N=rows.token_logprob_N[where],
            scalars={name: values[where] for name, values in rows.scalars.items()},
            top_ids_NK=rows.top_ids_NK[where],
            rank_gap_N=rows.rank_gap_N[where],
            head_gaps=tuple(gap_N[where] for gap_N in rows.head_gaps),
            padding_mass_N=rows.padding_mass_N[where],
        )

    whole = joined([part(slice(0, 15)), part(slice(15, None))])
    np.testing.assert_array_equal(whole.logprobs_NK, rows.logprobs_NK)
    np.testing.assert_array_equal(whole.top_ids_NK, rows.top_ids_NK)
    np.testing.assert_array_equal(whole.scalars["entropy"], rows.scalars["entropy"])
    assert [len(gap_N) for gap_N in whole.head_gaps] == [NUM_TOKENS, NUM_TOKENS]
