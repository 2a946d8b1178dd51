"""Finding the sample that kills engines, without losing any other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.steps.partitions import ALONE, TOGETHER, Partition, PartitionQueue
from storage.keys import sample_key
from storage.selection import SampleRequest


def request(number: int) -> SampleRequest:
    prompt_P = np.array([number], dtype=np.int32)
    return SampleRequest(sample_key(prompt_P, 0), 0, prompt_P, None, ())


def label_all(
    num_samples: int, size: int, in_flight: int, poisoned: set[int]
) -> tuple[list[int], list[int], int]:
    """Work until the queue is empty: numbers that were labelled, given up, and how many deaths.

    An engine begins ``in_flight`` samples at a time in their order, finishes those that are done
    and dies when it begins a poisoned one.
    """
    queue = PartitionQueue([request(number) for number in range(num_samples)], size)
    done: list[int] = []
    given_up: list[int] = []
    deaths = 0
    while queue:
        partition = queue.take()
        numbers = [int(r.prompt_ids_P[0]) for r in partition.requests]
        for start in range(0, len(numbers), in_flight):
            begun = numbers[start : start + in_flight]
            if poisoned.intersection(begun):
                deaths += 1
                guilty = queue.died(partition, partition.requests[start:], in_flight)
                if guilty is not None:
                    given_up.append(int(guilty.prompt_ids_P[0]))
                break
            done += begun
        assert deaths < 1000
    return done, given_up, deaths


@given(
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(1, 20),
    st.sets(st.integers(0, 59), max_size=4),
)
def test_exactly_the_poisoned_samples_are_given_up(
    num_samples: int, size: int, in_flight: int, poisoned: set[int]
) -> None:
    present = {number for number in poisoned if number < num_samples}
    done, given_up, deaths = label_all(num_samples, size, in_flight, present)
    assert sorted(done) == sorted(set(range(num_samples)) - present)
    assert sorted(given_up) == sorted(present)
    # every poisoned sample is halved down to, and tried alone
    most = TOGETHER + ALONE + math.ceil(math.log2(min(in_flight, size, num_samples) + 1))
    assert deaths <= most * max(1, len(present))


def test_a_death_by_chance_costs_nobody_anything() -> None:
    queue = PartitionQueue([request(number) for number in range(10)], 10)
    partition = queue.take()
    assert queue.died(partition, partition.requests[3:], 4) is None
    suspects, rest = queue.take(), queue.take()
    assert [int(r.prompt_ids_P[0]) for r in suspects.requests] == [3, 4, 5, 6]
    assert [int(r.prompt_ids_P[0]) for r in rest.requests] == [7, 8, 9]
    assert (suspects.deaths, rest.deaths, len(queue)) == (1, 0, 0)


def test_an_engine_that_died_with_nothing_left_leaves_nothing() -> None:
    queue = PartitionQueue([request(1)], 1)
    assert queue.died(queue.take(), [], 4) is None
    assert len(queue) == 0


@pytest.mark.parametrize("deaths", range(ALONE - 1))
def test_a_single_sample_gets_several_chances(deaths: int) -> None:
    queue = PartitionQueue([], 1)
    assert queue.died(Partition([request(1)], deaths), [request(1)], 1) is None
    assert queue.take().deaths == deaths + 1


def test_after_stopping_nothing_is_given_out() -> None:
    queue = PartitionQueue([request(number) for number in range(10)], 3)
    assert len(queue) == 4
    queue.clear()
    assert len(queue) == 0
