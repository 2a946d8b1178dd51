"""Ranges of columns are what slicing sample by sample gives, whichever way they are copied."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.held import HeldBatches
from storage.keys import CountsSpec
from storage.label_batch import Ranges, SampleRanges, join, ranges_of
from storage.testing import make_sample, make_spec

SPEC = make_spec(columns=("entropy", CountsSpec(draws=5)))
SAMPLES = [make_sample(number, SPEC, num_tokens=1 + number % 7) for number in range(9)]


@given(
    spans=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 90), st.integers(0, 60))),
    scale=st.sampled_from([1, 40]),
    width=st.sampled_from([None, 3]),
)
def test_a_copy_is_the_ranges_one_behind_the_other(
    spans: list[tuple[int, int, int]], scale: int, width: int | None
) -> None:
    """Short ranges go value by value, long ones as slices (``scale``)."""
    shape = (90 + 60 * scale,) if width is None else (90 + 60 * scale, width)
    random = np.random.default_rng(0)
    columns = [random.integers(1000, size=shape).astype(np.int32) for _ in range(3)]
    batch_S, start_S, length_S = np.array(spans, dtype=np.int64).reshape(-1, 3).T
    length_S = length_S * scale
    found = Ranges(batch_S, start_S, length_S).copy(columns, np.int64)
    expected = [
        columns[batch][start : start + length]
        for batch, start, length in zip(batch_S, start_S, length_S, strict=True)
    ]
    assert found.dtype == np.int64
    assert found.tolist() == np.concatenate([columns[0][:0], *expected]).tolist()


def test_samples_come_back_from_ranges() -> None:
    found = ranges_of(SAMPLES).samples()
    assert [repr(sample) for sample in found] == [repr(sample) for sample in SAMPLES]


def test_ranges_of_several_readers_are_joined_and_put_in_order() -> None:
    parts = [ranges_of(SAMPLES[:4]), ranges_of(SAMPLES[4:])]
    order = np.array([8, 0, 5, 5, 3])
    found = join(parts).take(order)
    assert found.keys == [SAMPLES[place].key for place in order]
    assert [sample.key for sample in found.samples()] == found.keys


def test_only_the_last_rows_are_taken_where_that_was_said() -> None:
    whole = ranges_of(SAMPLES[3:6])
    kept = SampleRanges(whole.batches, whole.batch_S, whole.place_S, np.array([1, 3, 2]))
    for sample, rows, full in zip(kept.samples(), [1, 3, 2], SAMPLES[3:6], strict=True):
        assert sample.positions_N.tolist() == full.positions_N[-rows:].tolist()
        assert sample.response_ids_R.tolist() == full.response_ids_R.tolist()
        for name, values in sample.optional.items():
            assert values.tolist() == full.optional[name][-rows:].tolist()
    together = join([kept, whole])
    assert together.rows.length_S.tolist() == [1, 3, 2, 4, 5, 6]


class Batch:
    nbytes = 10


@pytest.mark.parametrize(("max_bytes", "expected"), [(100, "abc"), (20, "abcac"), (0, "abcbac")])
def test_the_longest_unused_batches_are_let_go(max_bytes: int, expected: str) -> None:
    held, made = HeldBatches(max_bytes), ""
    for name in "abcbac":

        def make(name: str = name) -> Batch:
            nonlocal made
            made += name
            return Batch()

        held.get(name, make)
    assert made == expected


def test_a_batch_that_was_dropped_is_made_again() -> None:
    held = HeldBatches(100)
    first = held.get("a", Batch)
    assert held.get("a", Batch) is first
    held.drop("a")
    held.drop("never held")
    assert held.get("a", Batch) is not first
