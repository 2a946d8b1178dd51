"""The byte planes of the top-k label kind: exact ids, log-probs within 1/512 nat."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from storage.errors import BadLabelError, NotFiniteError, UnsortedError, VocabularyError
from storage.keys import MassSpec, TopKSpec
from storage.labels import LABEL_KINDS
from storage.labels.topk import MAX_STEPS, TopK

MAX_ERROR_NATS = 1 / 512
"""Half a step of 1/256 nat."""


def round_trip(ids_NK: np.ndarray, logprobs_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kind = TopK(TopKSpec(k=ids_NK.shape[1]))
    columns = kind.encode(ids_NK.astype(np.int32), logprobs_NK.astype(np.float32))
    names = [field.name for field in kind.fields()]
    return kind.decode(dict(zip(names, columns, strict=True)))


@given(st.lists(st.tuples(st.integers(0, 2**20 - 1), st.floats(-255.0, 0.0)), min_size=1))
def test_ids_are_exact_and_logprobs_are_within_half_a_step(row: list[tuple[int, float]]) -> None:
    ids_NK = np.array([[token_id for token_id, _ in row]])
    logprobs_NK = -np.sort([[-logprob for _, logprob in row]]).astype(np.float32)
    found_ids_NK, found_NK = round_trip(ids_NK, logprobs_NK)
    np.testing.assert_array_equal(found_ids_NK, ids_NK)
    assert np.abs(found_NK - logprobs_NK).max() <= MAX_ERROR_NATS
    assert (np.diff(found_NK, axis=1) <= 0).all()


@given(arrays.arrays(np.int32, (2, 8), elements=st.integers(0, 200)))
def test_encoding_what_was_decoded_changes_nothing(steps_NK: np.ndarray) -> None:
    """200 steps of at most 8 tokens: 8 * 200 / 256 = 6.25 nats, far from saturation."""
    logprobs_NK = np.cumsum(steps_NK, axis=1) / -256
    ids_NK = np.arange(16).reshape(2, 8)
    _, once_NK = round_trip(ids_NK, logprobs_NK)
    _, twice_NK = round_trip(ids_NK, once_NK)
    np.testing.assert_array_equal(once_NK, logprobs_NK.astype(np.float32))
    np.testing.assert_array_equal(twice_NK, once_NK)


@pytest.mark.parametrize("token_id", [0, 255, 256, 65535, 65536, 2**20 - 1])
def test_ids_survive_at_every_byte_boundary(token_id: int) -> None:
    ids_NK, _ = round_trip(np.array([[token_id]]), np.array([[-0.5]]))
    assert ids_NK.tolist() == [[token_id]]


@pytest.mark.parametrize("token_id", [-1, 2**20])
def test_ids_outside_the_largest_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(VocabularyError, match=r"top-k ids must lie in \[0, 1048576\)"):
        round_trip(np.array([[token_id]]), np.array([[-0.5]]))


def test_one_token_per_position_is_enough() -> None:
    # -1.0 nat is 256 steps exactly
    assert round_trip(np.array([[7], [8]]), np.array([[-1.0], [0.0]]))[1].tolist() == [
        [-1.0],
        [0.0],
    ]


def test_rows_that_are_not_sorted_are_refused() -> None:
    with pytest.raises(UnsortedError, match="sorted, likeliest first"):
        round_trip(np.array([[1, 2]]), np.array([[-2.0, -1.0]]))


def test_logprobs_saturate_at_the_last_step() -> None:
    # 65535 steps of 1/256 nat; every token below shares that value, so the last difference is 0
    _, found_NK = round_trip(np.array([[1, 2, 3]]), np.array([[-1.0, -300.0, -1000.0]]))
    assert found_NK.tolist() == [[-1.0, -MAX_STEPS / 256, -MAX_STEPS / 256]]


def test_a_logprob_above_zero_by_rounding_reads_as_zero() -> None:
    assert round_trip(np.array([[1]]), np.array([[1e-6]]))[1].tolist() == [[0.0]]


def test_no_rows_encode_to_no_rows() -> None:
    ids_NK, logprobs_NK = round_trip(np.zeros((0, 4)), np.zeros((0, 4)))
    assert ids_NK.shape == logprobs_NK.shape == (0, 4)


def test_a_slice_of_a_column_decodes_to_the_slice_of_its_rows() -> None:
    kind = TopK(TopKSpec(k=2))
    ids_NK = np.arange(8, dtype=np.int32).reshape(4, 2)
    logprobs_NK = np.array([[-n, -n - 1] for n in range(4)], dtype=np.float32)
    columns = kind.encode(ids_NK, logprobs_NK)
    sliced = {f.name: column.slice(1, 2) for f, column in zip(kind.fields(), columns, strict=True)}
    found_ids_NK, found_NK = kind.decode(sliced)
    np.testing.assert_array_equal(found_ids_NK, ids_NK[1:3])
    np.testing.assert_array_equal(found_NK, logprobs_NK[1:3])


def test_columns_are_plain_fixed_lists_of_bytes_without_nulls() -> None:
    fields = LABEL_KINDS["topk"](TopKSpec(k=5)).fields()
    assert [field.name for field in fields] == [
        "topk_id_b0",
        "topk_id_b1",
        "topk_id_b2",
        "topk_dq_b0",
        "topk_dq_b1",
    ]
    assert {field.type for field in fields} == {pa.list_(pa.uint8(), 5)}
    assert not any(field.nullable for field in fields)


def test_a_logprob_that_is_no_number_is_refused() -> None:
    with pytest.raises(NotFiniteError, match="NaN"):
        round_trip(np.array([[1, 2]]), np.array([[-1.0, np.nan]]))


@pytest.mark.parametrize("shape", [(2, 3), (4, 1), (4,)])
def test_arrays_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    kind = TopK(TopKSpec(k=2))
    with pytest.raises(BadLabelError, match=r"must have the shape \[N, 2\]"):
        kind.encode(np.zeros(shape, np.int32), np.zeros(shape, np.float32))


def test_decoded_arrays_are_ones_that_torch_takes_without_a_copy() -> None:
    for array in round_trip(np.array([[1]]), np.array([[-1.0]])):
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.flags.aligned


def test_rows_keep_k_tokens_or_all_there_are() -> None:
    kind = TopK(TopKSpec(k=2))
    assert kind.head_sizes(np.zeros((3, 5), np.float32)).tolist() == [2, 2, 2]
    assert kind.head_sizes(np.zeros((1, 1), np.float32)).tolist() == [1]


def test_the_top_k_covers_every_narrower_head() -> None:
    kind = TopK(TopKSpec(k=8))
    assert kind.covers(TopKSpec(k=8))
    assert kind.covers(TopKSpec(k=1))
    assert not kind.covers(TopKSpec(k=9))
    assert kind.covers(MassSpec(cap=8))
    assert not kind.covers(MassSpec(cap=9))
