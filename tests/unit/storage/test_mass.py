"""Adaptive k: heads of any length survive, cost little, and anybody's reader opens them."""

from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import BadLabelError, UnsortedError, VocabularyError
from storage.ipc import ArrowFile, encode_file
from storage.keys import MassSpec, TopKSpec
from storage.labels.mass import Mass
from storage.labels.topk import TopK

CAP = 5
NONE = -np.inf


def columns_of(
    kind: Mass | TopK, ids_NK: npt.ArrayLike, logprobs_NK: npt.ArrayLike
) -> dict[str, pa.Array]:
    arrays = kind.encode(np.array(ids_NK, np.int32), np.array(logprobs_NK, np.float32))
    return dict(zip([field.name for field in kind.fields()], arrays, strict=True))


@st.composite
def heads(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Padded ids and log-probs, the latter in steps of 1/256 nat."""
    lengths = draw(st.lists(st.integers(1, CAP), max_size=6))
    ids_NK = np.full((len(lengths), CAP), -1, np.int32)
    logprobs_NK = np.full((len(lengths), CAP), NONE, np.float32)
    for row, length in enumerate(lengths):
        ids = st.lists(st.integers(0, 2**20 - 1), min_size=length, max_size=length)
        steps = st.lists(st.integers(0, 2**16 - 1), min_size=length, max_size=length)
        ids_NK[row, :length] = draw(ids)
        logprobs_NK[row, :length] = -np.sort(draw(steps)) / 256
    return ids_NK, logprobs_NK


@given(heads())
def test_heads_of_any_length_survive(labels: tuple[np.ndarray, np.ndarray]) -> None:
    kind = Mass(MassSpec(cap=CAP))
    ids_NK, logprobs_NK = labels
    found_ids_NK, found_NK = kind.decode(columns_of(kind, ids_NK, logprobs_NK))
    assert (found_ids_NK.dtype, found_NK.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(found_ids_NK, ids_NK)
    np.testing.assert_array_equal(found_NK, logprobs_NK)


def test_a_cap_of_one_token_is_enough() -> None:
    kind = Mass(MassSpec(cap=1))
    ids_NK, logprobs_NK = kind.decode(columns_of(kind, [[2**20 - 1], [0]], [[-0.5], [0.0]]))
    assert ids_NK.tolist() == [[2**20 - 1], [0]]
    assert logprobs_NK.tolist() == [[-0.5], [0.0]]


def test_columns_are_a_count_and_the_planes_of_the_top_k_with_zeros_behind_the_head() -> None:
    kind = Mass(MassSpec(cap=3))
    columns = columns_of(kind, [[70000, 2, -1], [1, -1, -1]], [[-1, -3, NONE], [-2, NONE, NONE]])
    # 70000 = 1 * 65536 + 17 * 256 + 112; differences of 256, 512 and 512 steps
    assert {name: column.to_pylist() for name, column in columns.items()} == {
        "topk_n": [2, 1],
        "topk_id_b0": [[112, 2, 0], [1, 0, 0]],
        "topk_id_b1": [[17, 0, 0], [0, 0, 0]],
        "topk_id_b2": [[1, 0, 0], [0, 0, 0]],
        "topk_dq_b0": [[0, 0, 0], [0, 0, 0]],
        "topk_dq_b1": [[1, 2, 0], [2, 0, 0]],
    }
    assert kind.fields()[1:] == TopK(TopKSpec(k=3)).fields()


def test_a_slice_decodes_to_the_slice_of_its_rows() -> None:
    kind = Mass(MassSpec(cap=2))
    columns = columns_of(kind, [[1, 2], [3, -1], [4, 5]], [[-1, -2], [-3, NONE], [-4, -5]])
    sliced = {name: column.slice(1) for name, column in columns.items()}
    ids_NK, logprobs_NK = kind.decode(sliced)
    assert ids_NK.tolist() == [[3, -1], [4, 5]]
    assert logprobs_NK.tolist() == [[-3, NONE], [-4, -5]]


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([-1, 1], [NONE, -1], "stands behind an unused entry"),
        ([1, -1, 2], [-1, NONE, -2], "stands behind an unused entry"),
        ([-1, -1], [NONE, NONE], "keeps no token"),
        ([1, -1], [-1, -2], "minus infinity exactly where"),
        ([1, 2], [-1, NONE], "minus infinity exactly where"),
    ],
)
def test_gaps_and_half_used_entries_are_refused(
    ids: list[int], logprobs: list[float], message: str
) -> None:
    with pytest.raises(BadLabelError, match=message):
        columns_of(Mass(MassSpec(cap=len(ids))), [ids], [logprobs])


def test_what_the_planes_cannot_hold_is_refused() -> None:
    kind = Mass(MassSpec(cap=2))
    with pytest.raises(VocabularyError):
        columns_of(kind, [[2**20, -1]], [[-1, NONE]])
    with pytest.raises(VocabularyError):
        columns_of(kind, [[-2, -1]], [[-1, NONE]])
    with pytest.raises(UnsortedError):
        columns_of(kind, [[1, 2]], [[-2, -1]])
    with pytest.raises(BadLabelError, match=r"must have the shape \[N, 2\]"):
        columns_of(kind, [[1, 2, 3]], [[-1, -2, -3]])


def test_a_head_is_the_smallest_that_reaches_the_mass() -> None:
    kind = Mass(MassSpec(mass=0.8, cap=3))
    probabilities = [[0.9, 0.05, 0.03, 0.01], [0.5, 0.25, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]
    # 0.9; 0.5 + 0.25 + 0.1; four would be needed, three are allowed
    assert kind.head_sizes(np.log(probabilities).astype(np.float32)).tolist() == [1, 3, 3]
    assert kind.head_sizes(np.log([[0.5]]).astype(np.float32)).tolist() == [1]


def test_a_head_covers_smaller_ones_only() -> None:
    kind = Mass(MassSpec(mass=0.9, cap=8))
    assert kind.covers(MassSpec(mass=0.9, cap=8))
    assert kind.covers(MassSpec(mass=0.5, cap=4))
    assert not kind.covers(MassSpec(mass=0.95, cap=8))
    assert not kind.covers(MassSpec(mass=0.9, cap=9))
    assert not kind.covers(TopKSpec(k=1))


def file_of(kind: Mass | TopK, ids_NK: np.ndarray, logprobs_NK: np.ndarray) -> bytes:
    columns = columns_of(kind, ids_NK, logprobs_NK)
    batch = pa.RecordBatch.from_arrays(list(columns.values()), schema=pa.schema(kind.fields()))
    return encode_file([batch], batch.schema)


def test_on_a_flat_teacher_adaptive_k_costs_at_most_a_hundredth_more() -> None:
    generator = np.random.default_rng(0)
    ids_NK = (49152 * generator.random((4096, 64)) ** 3).astype(np.int32)
    logprobs_NK = -np.cumsum(generator.exponential(0.08, (4096, 64)), axis=1).astype(np.float32)
    fixed = len(file_of(TopK(TopKSpec(k=64)), ids_NK, logprobs_NK))
    short_NK = np.zeros((4096, 64), bool)
    short_NK[::50, 40:] = True
    ids_NK = np.where(short_NK, -1, ids_NK)
    logprobs_NK = np.where(short_NK, NONE, logprobs_NK)
    assert len(file_of(Mass(MassSpec(cap=64)), ids_NK, logprobs_NK)) <= 1.01 * fixed


def test_anybodys_reader_opens_the_columns(tmp_path: Path) -> None:
    kind = Mass(MassSpec(cap=3))
    ids_NK = np.array([[70000, 2, -1], [1, -1, -1]])
    logprobs_NK = np.array([[-1, -3, NONE], [-2, NONE, NONE]])
    data = file_of(kind, ids_NK, logprobs_NK)
    path = tmp_path / "x.labels.arrow"
    path.write_bytes(data)
    schema = pa.schema(kind.fields())
    with ArrowFile(pa.OSFile(str(path)), name=path.name, schema=schema) as file:
        batch = file.batch(0)
    np.testing.assert_array_equal(
        kind.decode(dict(zip(schema.names, batch.columns, strict=True)))[0], ids_NK
    )
    expected = [[112, 2, 0], [1, 0, 0]]
    assert pl.read_ipc(path)["topk_id_b0"].to_list() == expected
    assert [row.tolist() for row in pd.read_feather(path)["topk_id_b0"]] == expected
    labels = pa.dataset.dataset(path, format="ipc")  # noqa: F841 - named in the query
    found = duckdb.sql("select topk_id_b0, topk_n from labels").fetchall()
    assert [(list(row), n) for row, n in found] == list(zip(expected, [2, 1], strict=True))
