"""The choice of samples is fair, bounded, and the same for everybody."""

from collections import Counter
from typing import Any

import pytest

from storage.errors import NotLabelledError
from storage.spot_check import choose_samples
from storage.testing import make_sample, make_spec

SPEC = make_spec()
NUM_SAMPLES = 60


@pytest.fixture
def label_set(bench: Any) -> Any:
    """60 samples of 5 rows in three commits."""
    made = [make_sample(number, SPEC) for number in range(NUM_SAMPLES)]
    return bench.filled(made[:20], made[20:45], made[45:])


def test_the_choice_is_the_same_for_everybody(label_set: Any, bench: Any) -> None:
    one = choose_samples(label_set, rows=50, seed=3)
    assert one == choose_samples(bench.fresh(), rows=50, seed=3)
    assert (one.commit, one.num_samples, len(one.sample_keys)) == (3, NUM_SAMPLES, 10)
    assert label_set.contains(one.sample_keys).all()


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (5, 1), (6, 2), (299, 60), (10**6, 60)])
def test_samples_are_chosen_until_they_have_enough_rows(
    label_set: Any, rows: int, expected: int
) -> None:
    keys = choose_samples(label_set, rows=rows, seed=0).sample_keys
    assert len(set(keys)) == len(keys) == expected


def test_more_rows_go_on_with_the_same_order(label_set: Any) -> None:
    few = choose_samples(label_set, rows=40, seed=0).sample_keys
    many = choose_samples(label_set, rows=200, seed=0).sample_keys
    assert many[: len(few)] == few


def test_every_sample_is_as_likely_as_any_other(label_set: Any) -> None:
    """600 choices of 6 out of 60: each expects 60, with a standard deviation of 7.3."""
    counts: Counter[str] = Counter()
    for seed in range(600):
        counts.update(choose_samples(label_set, rows=30, seed=seed).sample_keys)
    assert len(counts) == NUM_SAMPLES
    assert min(counts.values()) > 30
    assert max(counts.values()) < 90


def test_another_commit_is_another_choice(label_set: Any) -> None:
    before = choose_samples(label_set, rows=30, seed=0)
    label_set.append([make_sample(NUM_SAMPLES, SPEC)], {})
    after = choose_samples(label_set, rows=30, seed=0)
    assert after.commit == 4
    assert set(after.sample_keys) != set(before.sample_keys)


def test_an_empty_set_has_nothing_to_look_at(bench: Any) -> None:
    with pytest.raises(NotLabelledError, match="holds no sample; label some first"):
        choose_samples(bench.create(), rows=30, seed=0)
