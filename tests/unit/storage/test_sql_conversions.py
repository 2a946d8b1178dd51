"""Label rows in other libraries: the same rows, only the columns that are asked for."""

import sys

import pytest

from storage.errors import LabelStoreError
from storage.testing import make_sample, make_spec

SPEC = make_spec(k=4)
SAMPLES = [make_sample(number, SPEC) for number in range(4)]
COLUMNS = ["sample_key", "position", "entropy", "topk_ids", "topk_logprobs"]


@pytest.fixture
def label_set(bench):
    return bench.filled(SAMPLES[:2], SAMPLES[2:], spec=SPEC)


@pytest.mark.parametrize("columns", [None, COLUMNS, ["entropy"]])
def test_polars_has_the_rows_of_the_table(label_set, columns) -> None:
    table = label_set.to_arrow(columns)
    frame = label_set.to_polars(columns)
    assert frame.columns == table.column_names
    assert frame.to_dicts() == table.to_pylist()


@pytest.mark.parametrize("columns", [None, COLUMNS, ["entropy"]])
def test_pandas_has_the_rows_of_the_table(label_set, columns) -> None:
    table = label_set.to_arrow(columns)
    frame = label_set.to_pandas(columns)
    assert list(frame.columns) == table.column_names
    for name in table.column_names:
        assert [
            value.tolist() if hasattr(value, "tolist") else value for value in frame[name]
        ] == table[name].to_pylist()


def test_an_empty_set_keeps_the_types_of_its_columns(bench) -> None:
    empty = bench.create(SPEC)
    table, frame = empty.to_arrow(), empty.to_polars()
    assert len(table) == len(frame) == empty.to_duckdb().aggregate("count(*)").fetchall()[0][0] == 0
    full = bench.filled(SAMPLES, spec=SPEC)
    assert len(full.to_arrow()) == 20
    assert table.schema == full.to_arrow().schema
    assert frame.schema == full.to_polars().schema
    assert full.to_duckdb().aggregate("count(*)").fetchall() == [(20,)]


@pytest.mark.parametrize("name", ["polars", "pandas", "datasets", "duckdb"])
def test_a_package_that_is_missing_is_named(
    label_set, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LabelStoreError, match=f"to_{name} needs .*: pip install {name}"):
        getattr(label_set, f"to_{name}")()


@pytest.mark.parametrize("method", ["arrow", "polars", "pandas", "datasets", "duckdb"])
def test_an_unknown_column_lists_the_known_ones(label_set, method: str) -> None:
    with pytest.raises(LabelStoreError, match="has no column 'logits'; it has sample_key"):
        getattr(label_set, f"to_{method}")(["logits"])
