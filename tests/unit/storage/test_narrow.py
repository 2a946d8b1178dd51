"""Leaving out keeps a label a distribution: what is dropped goes into the tail."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.columns import arrow_columns
from storage.keys import (
    CountsSpec,
    LabelSetSpec,
    MassSpec,
    StratifiedSpec,
    ThresholdSpec,
    TopKSpec,
)
from storage.narrow import narrow, satisfies
from storage.tail import LOG_ZERO
from storage.testing import make_sample, make_spec

SPEC = make_spec(k=16)
SAMPLES = [make_sample(number, SPEC) for number in range(6)]


def with_kind(kind: TopKSpec | MassSpec, **changes: object) -> LabelSetSpec:
    return SPEC.model_copy(update={"kind": kind, **changes})


def mass_of(sample) -> np.ndarray:
    """float64[N]: the whole probability of every row."""
    kept = np.exp(sample.topk_logprobs_NK.astype(np.float64)).sum(axis=1)
    return kept + np.exp(sample.log_tail_mass_N.astype(np.float64))


@given(st.sampled_from(SAMPLES), st.integers(1, 16))
def test_a_smaller_k_keeps_the_likeliest_and_all_the_mass(sample, k: int) -> None:
    found = narrow(sample, with_kind(TopKSpec(k=k)))
    np.testing.assert_array_equal(found.topk_ids_NK, sample.topk_ids_NK[:, :k])
    np.testing.assert_array_equal(found.topk_logprobs_NK, sample.topk_logprobs_NK[:, :k])
    np.testing.assert_allclose(mass_of(found), mass_of(sample), rtol=1e-6)
    found.check(with_kind(TopKSpec(k=k)))


@given(st.sampled_from(SAMPLES), st.floats(0.01, 0.99), st.integers(1, 16))
def test_a_head_is_the_shortest_that_reaches_its_mass(sample, mass: float, cap: int) -> None:
    spec = with_kind(MassSpec(mass=mass, cap=cap))
    found = narrow(sample, spec)
    assert found.topk_ids_NK.shape[1] == cap
    np.testing.assert_allclose(mass_of(found), mass_of(sample), rtol=1e-6)
    found.check(spec)
    sums = np.cumsum(np.exp(sample.topk_logprobs_NK.astype(np.float64)), axis=1)
    lengths = (found.topk_ids_NK >= 0).sum(axis=1)
    expected = np.minimum(1 + (sums < mass).sum(axis=1), cap)
    np.testing.assert_array_equal(lengths, expected)


@given(st.sampled_from(SAMPLES), st.integers(1, 16), st.integers(1, 16))
def test_narrowing_twice_is_narrowing_once(sample, one: int, other: int) -> None:
    wide, small = (with_kind(TopKSpec(k=k)) for k in (max(one, other), min(one, other)))
    twice, once = narrow(narrow(sample, wide), small), narrow(sample, small)
    np.testing.assert_array_equal(twice.topk_ids_NK, once.topk_ids_NK)
    np.testing.assert_allclose(twice.log_tail_mass_N, once.log_tail_mass_N, atol=1e-5)


def test_the_same_width_changes_nothing() -> None:
    found = narrow(SAMPLES[0], SPEC)
    for name in ("topk_ids_NK", "topk_logprobs_NK", "log_tail_mass_N", "entropy_N"):
        np.testing.assert_array_equal(getattr(found, name), getattr(SAMPLES[0], name))
        assert getattr(found, name).dtype == getattr(SAMPLES[0], name).dtype


def test_a_tail_of_no_mass_takes_up_what_is_dropped() -> None:
    logprobs = np.log(np.array([[0.5, 0.25, 0.125, 0.125]])).astype(np.float32)
    row = replace(
        SAMPLES[0],
        topk_ids_NK=np.arange(4, dtype=np.int32)[None],
        topk_logprobs_NK=logprobs,
        log_tail_mass_N=np.array([LOG_ZERO], np.float32),
    )
    found = narrow(row, with_kind(TopKSpec(k=2)))
    assert np.abs(np.exp(found.log_tail_mass_N) - 0.25).max() < 1e-6
    kept = narrow(row, with_kind(TopKSpec(k=4)))
    assert kept.log_tail_mass_N.tolist() == [LOG_ZERO]
    # 0.5 + 0.25 reach 0.74, so the head is two tokens long
    head = narrow(row, with_kind(MassSpec(mass=0.74, cap=4)))
    assert head.topk_ids_NK.tolist() == [[0, 1, -1, -1]]
    assert head.topk_logprobs_NK[0, 2:].tolist() == [-np.inf, -np.inf]


@pytest.mark.parametrize(
    ("change", "satisfied"),
    [
        ({}, True),
        ({"kind": TopKSpec(k=15)}, True),
        ({"kind": TopKSpec(k=17)}, False),
        ({"kind": MassSpec(mass=0.999, cap=16)}, True),
        ({"kind": MassSpec(mass=0.1, cap=17)}, False),
        ({"columns": ()}, True),
        ({"tail": "topk"}, True),
        ({"vocab_size": 99}, False),
        ({"generation": make_spec(seed=1).generation}, False),
    ],
)
def test_a_set_satisfies_what_it_holds(change: dict[str, object], satisfied: bool) -> None:
    assert satisfies(SPEC, SPEC.model_copy(update=change)) == satisfied


def test_neither_a_column_nor_an_exact_tail_can_be_made_up() -> None:
    plain = SPEC.model_copy(update={"columns": ()})
    derived = SPEC.model_copy(update={"tail": "topk"})
    assert not satisfies(plain, SPEC)
    assert not satisfies(derived, SPEC)
    assert satisfies(derived, derived)


# -- optional columns ------------------------------------------------------------------------------
NAMES = ("entropy", "power_sum_10", "power_sum_200", "power_sum_400", "power_sums")


def test_columns_that_are_not_wanted_are_dropped_and_the_others_kept() -> None:
    stored = make_spec(k=16, columns=(*NAMES, CountsSpec(draws=20)))
    sample = make_sample(2, stored)
    for columns in [(), ("entropy",), ("power_sums",), (CountsSpec(draws=20),), stored.columns]:
        wanted = make_spec(k=8, columns=columns)
        assert satisfies(stored, wanted)
        found = narrow(sample, wanted)
        found.check(wanted)
        assert list(found.optional) == [n for n in sample.optional if n in arrow_columns(wanted)]
        for name, values in found.optional.items():
            np.testing.assert_array_equal(values, sample.optional[name])


@pytest.mark.parametrize(
    "sampled", [StratifiedSpec(draws=3), ThresholdSpec(threshold=0.1)], ids=str
)
def test_samples_of_the_tail_serve_their_own_head_only(sampled) -> None:
    """What a smaller head drops joins the tail, and nothing of it was sampled."""
    stored = make_spec(k=16, columns=("entropy", sampled))
    same, smaller = (make_spec(k=k, columns=(sampled,)) for k in (16, 15))
    assert satisfies(stored, same)
    assert not satisfies(stored, smaller)
    head = make_spec(kind=MassSpec(mass=0.9, cap=16), columns=(sampled,))
    assert not satisfies(stored, head)
    assert satisfies(stored, make_spec(k=15))
    narrow(make_sample(1, stored), make_spec(k=15)).check(make_spec(k=15))


def test_counts_serve_every_head_and_no_other_number_of_draws() -> None:
    stored = make_spec(k=16, columns=(CountsSpec(draws=20),))
    assert satisfies(stored, make_spec(k=3, columns=(CountsSpec(draws=20),)))
    assert not satisfies(stored, make_spec(k=3, columns=(CountsSpec(draws=10),)))
    head = make_spec(kind=MassSpec(mass=0.5, cap=8), columns=(CountsSpec(draws=20),))
    assert satisfies(stored, head)
    narrow(make_sample(4, stored), head).check(head)
