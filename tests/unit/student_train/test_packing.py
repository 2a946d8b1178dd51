"""Packing: every sample once, no row above its capacity, and rows as full as they can be."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.streaming.packing import RowOrder, pack

lengths_of_samples = st.lists(st.integers(1, 60), max_size=60)
capacities = st.integers(1, 100)
ways: st.SearchStrategy[RowOrder] = st.sampled_from(["first_fit", "length_sorted"])


def sizes(rows: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[place] for place in row) for row in rows]


@given(lengths_of_samples, capacities, ways)
def test_every_sample_is_in_exactly_one_row(
    lengths: list[int], capacity: int, how: RowOrder
) -> None:
    rows = pack(lengths, capacity, how)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))


@given(lengths_of_samples, capacities, ways)
def test_only_a_sample_that_is_longer_by_itself_exceeds_the_capacity(
    lengths: list[int], capacity: int, how: RowOrder
) -> None:
    rows = pack(lengths, capacity, how)
    for row, size in zip(rows, sizes(rows, lengths), strict=True):
        assert size <= capacity or len(row) == 1


@given(lengths_of_samples, capacities, ways)
def test_the_same_lengths_give_the_same_rows(
    lengths: list[int], capacity: int, how: RowOrder
) -> None:
    assert pack(lengths, capacity, how) == pack(list(lengths), capacity, how)


@given(lengths_of_samples, capacities)
def test_no_two_rows_of_first_fit_would_fit_into_one(lengths: list[int], capacity: int) -> None:
    for one, other in combinations(sizes(pack(lengths, capacity, "first_fit"), lengths), 2):
        assert one + other > capacity


@given(lengths_of_samples, capacities)
def test_rows_of_length_sorted_do_not_interleave(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity, "length_sorted")
    for row, following in pairwise(rows):
        assert min(lengths[place] for place in row) >= max(lengths[place] for place in following)


def test_first_fit_fills_what_longer_samples_leave() -> None:
    #               6 + 4, 5 + 3 + 2
    assert pack([4, 2, 6, 5, 3], 10, "first_fit") == [[2, 0], [3, 4, 1]]
    assert pack([4, 2, 6, 5, 3], 10, "length_sorted") == [[2], [3, 0], [4, 1]]


def test_rows_of_typical_answers_are_almost_full() -> None:
    """The claim of the docstring: a few per cent are wasted on lengths of answers."""
    import numpy as np

    drawn = np.random.default_rng(0).lognormal(5.3, 0.8, size=2000).clip(8, 2048)
    lengths = drawn.astype(int).tolist()
    rows = pack(lengths, 2048, "first_fit")
    assert sum(lengths) / (2048 * len(rows)) > 0.97


@pytest.mark.parametrize("how", ["first_fit", "length_sorted"])
def test_no_samples_are_no_rows(how: RowOrder) -> None:
    assert pack([], 10, how) == []
