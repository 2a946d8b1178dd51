"""Steps of a training: each sample once per epoch, counted right, the same for every world size."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.config import BatchConfig
from student_train.streaming.step_plan import TrainingPlan, split_by_padded_size

LENGTHS = np.array([30, 10, 20, 25, 5, 40, 15, 10])
BATCH = BatchConfig(tokens=50, micro_tokens=40)

lengths_of_samples = st.lists(st.integers(2, 60), min_size=1, max_size=60).map(np.array)
budgets = st.builds(
    BatchConfig,
    tokens=st.integers(1, 300),
    micro_tokens=st.integers(1, 150),
    row_tokens=st.integers(1, 80),
    packing=st.sampled_from(["first_fit", "length_sorted", "padded"]),
    window_tokens=st.integers(1, 300),
)
worlds = st.sampled_from([1, 2, 4, 8, 64])


def plan(
    lengths: np.ndarray = LENGTHS, batch: BatchConfig = BATCH, *, seed: int = 0, epochs: int = 1
) -> TrainingPlan:
    """Steps of samples of which half the tokens are supervised."""
    members = [np.arange(len(lengths))] * epochs
    return TrainingPlan(members, lengths // 2, lengths, batch, seed=seed)


def micro_batches(found: TrainingPlan, step: int, world_size: int) -> list[list[int]]:
    """Samples of all micro-batches of a step, over all ranks."""
    return [
        [sample for _, samples in group for sample in samples]
        for rank in range(world_size)
        for group in found.rounds(step, rank, world_size)
        if group is not None
    ]


@given(lengths_of_samples, budgets, worlds, st.integers(1, 3))
def test_every_sample_is_in_exactly_one_micro_batch_of_an_epoch(
    lengths: np.ndarray, batch: BatchConfig, world_size: int, epochs: int
) -> None:
    found = plan(lengths, batch, epochs=epochs)
    seen = Counter(
        sample
        for step in range(len(found))
        for group in micro_batches(found, step, world_size)
        for sample in group
    )
    assert seen == dict.fromkeys(range(len(lengths)), epochs)


@given(lengths_of_samples, budgets, worlds)
def test_ranks_share_the_samples_of_a_step_that_does_not_depend_on_their_number(
    lengths: np.ndarray, batch: BatchConfig, world_size: int
) -> None:
    found = plan(lengths, batch)
    for step in range(len(found)):
        shared = [s for group in micro_batches(found, step, world_size) for s in group]
        assert sorted(shared) == sorted(found.step(step).samples)


@given(lengths_of_samples, budgets, worlds)
def test_all_ranks_have_as_many_rounds(
    lengths: np.ndarray, batch: BatchConfig, world_size: int
) -> None:
    found = plan(lengths, batch)
    for step in range(len(found)):
        rounds = [found.rounds(step, rank, world_size) for rank in range(world_size)]
        assert len({len(each) for each in rounds}) == 1
        assert any(each[-1] is not None for each in rounds)


@given(lengths_of_samples, budgets)
def test_only_a_single_row_may_exceed_the_budget_of_a_step(
    lengths: np.ndarray, batch: BatchConfig
) -> None:
    found = plan(lengths, batch)
    for step in map(found.step, range(len(found))):
        assert step.num_tokens <= batch.tokens or len(step.samples) == 1


@given(lengths_of_samples, budgets, worlds)
def test_only_a_single_sample_may_exceed_the_size_of_a_micro_batch(
    lengths: np.ndarray, batch: BatchConfig, world_size: int
) -> None:
    found = plan(lengths, batch)
    for step in range(len(found)):
        for group in micro_batches(found, step, world_size):
            padded = len(group) * int(lengths[group].max())
            size = padded if batch.packing == "padded" else int(lengths[group].sum())
            assert size <= batch.micro_tokens or len(group) == 1


@given(lengths_of_samples, budgets)
def test_the_counts_of_a_step_are_those_of_its_samples(
    lengths: np.ndarray, batch: BatchConfig
) -> None:
    found = plan(lengths, batch)
    for step in map(found.step, range(len(found))):
        assert step.num_tokens == lengths[step.samples].sum()
        assert step.num_supervised == (lengths[step.samples] // 2).sum()


@given(lengths_of_samples, budgets, st.integers(1, 150))
def test_steps_do_not_depend_on_the_size_of_micro_batches_or_on_padding(
    lengths: np.ndarray, batch: BatchConfig, micro_tokens: int
) -> None:
    """Samples of a step, and with them its gradient, are a matter of order and ``tokens``."""
    one = plan(lengths, batch)
    changes = {"micro_tokens": micro_tokens}
    if batch.packing == "first_fit":
        changes["packing"] = "padded"
    other = plan(lengths, batch.model_copy(update=changes))
    assert len(one) == len(other)
    for step in range(len(one)):
        assert one.step(step) == other.step(step)


@given(lengths_of_samples, budgets, worlds)
def test_a_rank_reads_the_lanes_that_are_its_own(
    lengths: np.ndarray, batch: BatchConfig, world_size: int
) -> None:
    found = plan(lengths, batch)
    for step in range(len(found)):
        for rank in range(world_size):
            for group in found.rounds(step, rank, world_size):
                assert all(place % world_size == rank for place, _ in group or ())


def test_the_steps_of_a_seed_never_change() -> None:
    """Pinned: a resume on another machine must see the same steps."""
    found = plan()
    assert [sorted(found.step(step).samples) for step in range(len(found))] == [
        [1, 2],
        [3, 6],
        [0, 4, 7],
        [5],
    ]


def test_a_plan_is_known_by_its_digest() -> None:
    """A checkpoint is refused where a sample that was labelled again has another length."""
    longer = LENGTHS.copy()
    longer[3] += 30
    seeds = [plan(seed=seed).digest for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert plan(longer).digest != seeds[0]


def test_ranks_have_about_equal_work() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, size=3000)
    found = plan(lengths, BatchConfig(tokens=16384, row_tokens=512, micro_tokens=512))
    for step in range(len(found) - 8):  # lanes run out at the end of an epoch
        rows = Counter(row.place % 4 for row in found.step(step).rows)
        assert max(rows.values()) - min(rows[rank] for rank in range(4)) <= 2


# -- padding --------------------------------------------------------------------------------------
def test_micro_batches_hold_samples_of_like_length_longest_first() -> None:
    # sorted: 40 | 30 | 25 | 20 20 -> 40 = 2 * 20 | 10 10 10 10 = 4 * 10
    lengths = np.array([10, 30, 20, 10, 40, 10, 25, 20, 10])
    groups = list(split_by_padded_size(range(9), lengths, 40))
    assert groups == [(4,), (1,), (6,), (2, 7), (0, 3, 5, 8)]


@pytest.mark.parametrize("micro_tokens", [1, 40])
def test_no_samples_are_no_micro_batches(micro_tokens: int) -> None:
    assert list(split_by_padded_size([], np.array([]), micro_tokens)) == []
