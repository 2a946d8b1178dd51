"""The order of an epoch: each sample once, lanes that never mix, the same for every world size."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.config import BatchConfig
from student_train.streaming.order import PlacedRow, draw_members, epoch_rows, group_rows

batches = st.builds(
    BatchConfig,
    tokens=st.integers(1, 400),
    row_tokens=st.integers(1, 60),
    lanes=st.sampled_from([1, 2, 3, 8, 64]),
    window_tokens=st.integers(1, 300),
    packing=st.sampled_from(["first_fit", "length_sorted", "padded"]),
)
lengths_of_samples = st.lists(st.integers(2, 60), min_size=1, max_size=80).map(np.array)
BATCH = BatchConfig(tokens=400, row_tokens=40, lanes=4, window_tokens=80)
LENGTHS = np.array([12, 7, 30, 25, 9, 14, 41, 5, 16, 22, 8, 11])

PINNED = [
    PlacedRow((9, 8), 0),
    PlacedRow((4,), 1),
    PlacedRow((6,), 2),
    PlacedRow((0,), 3),
    PlacedRow((11, 10), 0),
    PlacedRow((3, 5), 1),
    PlacedRow((7,), 2),
    PlacedRow((2, 1), 3),
]


def rows_of(
    lengths: np.ndarray, batch: BatchConfig = BATCH, *, seed: int = 0, epoch: int = 0
) -> list[PlacedRow]:
    return epoch_rows(np.arange(len(lengths)), lengths, batch, seed=seed, epoch=epoch)


def flat(rows: list[PlacedRow]) -> list[int]:
    return [sample for row in rows for sample in row.samples]


@given(lengths_of_samples, batches, st.integers(0, 3), st.integers(0, 3))
def test_every_sample_is_in_exactly_one_row(
    lengths: np.ndarray, batch: BatchConfig, seed: int, epoch: int
) -> None:
    assert sorted(flat(rows_of(lengths, batch, seed=seed, epoch=epoch))) == list(
        range(len(lengths))
    )


@given(lengths_of_samples, batches)
def test_no_row_is_above_its_size(lengths: np.ndarray, batch: BatchConfig) -> None:
    for row in rows_of(lengths, batch):
        size = int(lengths[list(row.samples)].sum())
        assert size <= min(batch.row_tokens, max(1, batch.tokens // 8)) or len(row.samples) == 1


@given(lengths_of_samples, batches)
def test_a_place_holds_the_samples_of_one_lane(lengths: np.ndarray, batch: BatchConfig) -> None:
    """So a record batch, whose samples follow each other by key, is decoded by one rank."""
    by_place: dict[int, list[int]] = {}
    for row in rows_of(lengths, batch):
        by_place.setdefault(row.place, []).extend(row.samples)
    for samples in by_place.values():
        assert sorted(samples) == list(range(min(samples), max(samples) + 1))


@given(lengths_of_samples, batches)
def test_lanes_take_turns(lengths: np.ndarray, batch: BatchConfig) -> None:
    turns: Counter[int] = Counter()
    seen = []
    for row in rows_of(lengths, batch):
        seen.append((turns[row.place], row.place))
        turns[row.place] += 1
    assert seen == sorted(seen)


def test_lanes_are_of_about_equal_size() -> None:
    lengths = np.random.default_rng(0).integers(2, 200, size=5000)
    by_place: Counter[int] = Counter()
    for row in rows_of(lengths, BatchConfig()):
        by_place[row.place] += int(lengths[list(row.samples)].sum())
    assert len(by_place) == 64
    assert max(by_place.values()) - min(by_place.values()) <= 2 * 200


def test_the_order_of_a_seed_and_an_epoch_never_changes() -> None:
    """Pinned: a resume on another machine must see the same rows."""
    assert rows_of(LENGTHS, seed=3, epoch=1) == PINNED


def test_samples_are_shuffled_within_windows_of_their_lane() -> None:
    """Every lane goes through its samples from some place on, and never far from in order."""
    lengths = np.full(400, 10)
    batch = BatchConfig(tokens=80, row_tokens=10, lanes=2, window_tokens=50)
    by_place: dict[int, list[int]] = {}
    for row in rows_of(lengths, batch):
        by_place.setdefault(row.place, []).extend(row.samples)
    for samples in by_place.values():
        windows = [samples[start : start + 5] for start in range(0, 200, 5)]
        assert any(window != sorted(window) for window in windows)
        first = min(windows[0])
        lowest = min(samples)
        for number, window in enumerate(windows):
            expected = {lowest + (first - lowest + 5 * number + n) % 200 for n in range(5)}
            assert set(window) == expected


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    lengths = np.full(50, 10)
    orders = {
        tuple(flat(rows_of(lengths, seed=seed, epoch=epoch))) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_padded_rows_are_those_of_first_fit() -> None:
    """The steps of both are the same, so that their losses can be compared."""
    padded = BATCH.model_copy(update={"packing": "padded"})
    assert rows_of(LENGTHS, padded) == rows_of(LENGTHS, BATCH)


# -- groups ---------------------------------------------------------------------------------------
@given(lengths_of_samples, st.integers(1, 300))
def test_groups_hold_consecutive_rows_up_to_their_size(lengths: np.ndarray, tokens: int) -> None:
    rows = rows_of(lengths)
    groups = group_rows(rows, lengths, tokens)
    assert [row for group in groups for row in group] == rows
    size = [sum(int(lengths[list(row.samples)].sum()) for row in group) for group in groups]
    for number, group in enumerate(groups):
        assert size[number] <= tokens or len(group) == 1
        if number:  # it did not fit into the one before
            first = int(lengths[list(group[0].samples)].sum())
            assert size[number - 1] + first > tokens


# -- weights --------------------------------------------------------------------------------------
SOURCES = np.repeat([0, 1, 2], [10, 20, 40])
KEY_ORDER = np.random.default_rng(0).permutation(70)


def members(weights: list[float], epoch: int = 0) -> np.ndarray:
    return draw_members(SOURCES, weights, seed=0, epoch=epoch, key_order_S=KEY_ORDER)


def test_a_weight_is_a_number_of_passes() -> None:
    drawn = Counter(members([1, 0.5, 2.25]).tolist())
    of_source = [[drawn[place] for place in np.flatnonzero(n == SOURCES)] for n in range(3)]
    assert of_source[0] == [1] * 10
    assert sorted(of_source[1]) == [0] * 10 + [1] * 10
    assert sorted(of_source[2]) == [2] * 30 + [3] * 10


def test_members_come_in_the_order_of_their_keys() -> None:
    rank_S = np.argsort(KEY_ORDER)
    drawn = members([1, 0.5, 2])
    assert (np.diff(rank_S[drawn]) >= 0).all()
    assert members([1, 1, 1]).tolist() == KEY_ORDER.tolist()


def test_what_a_fraction_takes_is_drawn_anew_for_every_epoch() -> None:
    halves = [set(members([0.5, 0.5, 0.5], epoch).tolist()) for epoch in range(2)]
    assert halves[0] != halves[1]
    assert halves[0] == set(members([0.5, 0.5, 0.5]).tolist())


@pytest.mark.parametrize("other", [0.25, 1.0, 3.5])
def test_the_weight_of_one_source_does_not_move_the_draw_of_another(other: float) -> None:
    first = [place for place in members([0.5, 1, 1]).tolist() if SOURCES[place] == 0]
    again = [place for place in members([0.5, other, 1]).tolist() if SOURCES[place] == 0]
    assert first == again
