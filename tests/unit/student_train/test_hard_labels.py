"""Which token is the hard label: the stored one, the likeliest, or a reproducible random one."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.label_batch import ranges_of
from storage.samples import LabelledSample
from student_train.hard.labels import hard_labels, random_tokens

V = 40


def test_sampled_and_dataset_tokens_are_those_of_the_response(
    samples: list[LabelledSample],
) -> None:
    for sample in samples:
        for hard in ("sampled", "dataset"):
            found = hard_labels(ranges_of([sample]), hard, vocab_size=V)  # type: ignore[arg-type]
            assert found.tolist() == sample.response_ids_R.tolist()
            assert found.dtype == np.int64


def test_argmax_is_the_first_stored_token(samples: list[LabelledSample]) -> None:
    found = [hard_labels(ranges_of([sample]), "argmax", vocab_size=V) for sample in samples]
    expected = [sample.topk_ids_NK[:, 0] for sample in samples]
    assert np.array_equal(np.concatenate(found), np.concatenate(expected))


@given(st.text(max_size=40), st.lists(st.integers(0, 50), min_size=1, unique=True))
def test_a_random_token_is_a_function_of_sample_and_position(
    key: str, positions: list[int]
) -> None:
    """Masks, batches and epochs do not change it."""
    everywhere = random_tokens(key, np.arange(51), vocab_size=V)
    some = np.array(sorted(positions))
    assert random_tokens(key, some, vocab_size=V).tolist() == everywhere[some].tolist()
    assert ((everywhere >= 0) & (everywhere < V)).all()


def test_the_random_tokens_of_a_sample_never_change() -> None:
    """Pinned: a resume with another numpy must see the same labels."""
    found = random_tokens("sample", np.arange(6), vocab_size=1000).tolist()
    assert found == [493, 161, 326, 53, 456, 143]


def test_random_tokens_are_uniform_and_independent_of_each_other() -> None:
    num_keys, num_positions = 400, 50
    found = np.stack(
        [
            random_tokens(str(key), np.arange(num_positions), vocab_size=10)
            for key in range(num_keys)
        ]
    )
    counts = np.array([Counter(found.ravel().tolist())[token] for token in range(10)])
    expected = found.size / 10
    # chi-square with 9 degrees of freedom: above 33 once in 10,000; the keys are fixed
    assert ((counts - expected) ** 2 / expected).sum() < 33
    pairs = np.histogram2d(found[:, :-1].ravel(), found[:, 1:].ravel(), bins=10)[0]
    expected = pairs.sum() / 100
    # 99 degrees of freedom: above 161 once in 10,000
    assert ((pairs - expected) ** 2 / expected).sum() < 161


@pytest.mark.parametrize("vocab_size", [1, 2])
def test_the_smallest_vocabularies(vocab_size: int) -> None:
    found = random_tokens("sample", np.arange(20), vocab_size=vocab_size)
    assert set(found.tolist()) == set(range(vocab_size))
