"""Partitions cut a set by leading bits: every sample in one, the samples of a prompt together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.index import parse_keys
from storage.keys import sample_key
from storage.partitions import (
    MAX_PARTITION_BITS,
    common_partition,
    leading_bits,
    partition_bits,
    shard_bits,
)
from storage.testing import make_sample, make_spec
from storage.writer import split

BITS = st.integers(0, 16)
KEYS = st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), min_size=1, max_size=30)


def binary(key: str) -> str:
    """The 128 bits of a key as text."""
    return format(int(key, 16), "0128b")


@given(KEYS, BITS)
def test_every_key_lies_in_one_of_the_partitions(keys: list[str], bits: int) -> None:
    numbers = leading_bits(parse_keys(keys), bits)
    assert numbers.tolist() == [int(binary(key)[:bits] or "0", 2) for key in keys]
    assert (numbers < 2**bits).all()


@given(KEYS, BITS)
def test_the_common_partition_is_the_longest_prefix_that_all_keys_share(
    keys: list[str], bits: int
) -> None:
    found = common_partition(parse_keys(keys), bits)
    assert all(binary(key).startswith(found) for key in keys)
    longer = {binary(key)[: len(found) + 1] for key in keys}
    assert len(found) == bits or len(longer) == 2
    assert len(found) <= bits


@given(st.lists(st.integers(0, 2**20 - 1), max_size=6), st.integers(0, 9), st.integers(0, 9), BITS)
def test_the_samples_of_a_prompt_stay_together(
    prompt: list[int], one: int, other: int, bits: int
) -> None:
    keys = parse_keys([sample_key(prompt, one), sample_key(prompt, other, response_ids=[1])])
    first, second = leading_bits(keys, bits).tolist()
    assert first == second


@pytest.mark.parametrize(
    ("num_tokens", "bits"),
    [(0, 0), (2**20, 0), (2**21 - 1, 0), (2**21, 1), (2**24, 4), (2**36, 16), (2**60, 16)],
)
def test_a_partition_has_about_a_million_tokens(num_tokens: int, bits: int) -> None:
    assert partition_bits(num_tokens) == bits


@pytest.mark.parametrize(
    ("num_tokens", "bits", "expected"),
    [
        (0, 16, 0),
        (50_000, 16, 0),
        (99_999, 16, 0),  # two shards would have less than 50 000 tokens each
        (100_000, 16, 1),
        (100_000, 0, 0),  # never finer than the partitions
        (50_000 * 16, 3, 3),
        (2**60, 16, MAX_PARTITION_BITS),
    ],
)
def test_a_commit_is_not_cut_into_small_shards(num_tokens: int, bits: int, expected: int) -> None:
    assert shard_bits(num_tokens, bits) == expected


@pytest.mark.parametrize("bits", [0, 1, 3, 16])
def test_a_commit_is_cut_into_groups_of_one_partition_in_key_order(bits: int) -> None:
    spec = make_spec()
    samples = [make_sample(number, spec, num_tokens=1) for number in range(40)]
    groups = list(split(samples, bits))
    assert [s.key for group in groups for s in group] == sorted(s.key for s in samples)
    prefixes = [{binary(sample.key)[:bits] for sample in group} for group in groups]
    assert all(len(prefix) == 1 for prefix in prefixes)
    assert len(groups) == len({binary(sample.key)[:bits] for sample in samples})


def test_a_group_has_no_more_rows_than_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 10 rows: samples of 4 go in pairs, one of 11 goes alone."""
    monkeypatch.setattr("storage.writer.SHARD_ROWS", 10)
    spec = make_spec()
    samples = [make_sample(number, spec, num_tokens=4) for number in range(5)]
    large = make_sample(5, spec, num_tokens=11)
    sizes = [[len(s.positions_N) for s in group] for group in split([*samples, large], 0)]
    assert all(sum(group) <= 10 or group == [11] for group in sizes)
    assert sorted(np.concatenate(sizes).tolist()) == [4, 4, 4, 4, 4, 11]
    assert list(split([], 3)) == []
