"""A shard is read as it was written, or not at all; and anybody's Arrow reader can open it."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pytest

from storage.errors import FormatError, ShardCorruptError
from storage.keys import LabelSetSpec
from storage.samples import LabelledSample
from storage.schema import labels_schema, samples_schema
from storage.shard import BATCH_ROWS, ShardBytes, ShardFile, column_digest, encode_shard
from storage.testing import make_sample, make_spec

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC, num_tokens=3 + number % 4) for number in range(12)]
SHARD = encode_shard(SAMPLES, SPEC)

ROWS_PER_SAMPLE = 1500
"""Two samples of this size fit a batch of 4096 rows, three do not."""


def open_labels(data: bytes, spec: LabelSetSpec = SPEC) -> ShardFile:
    return ShardFile(data, name="store/x.labels.arrow", schema=labels_schema(spec))


def open_samples(data: bytes, spec: LabelSetSpec = SPEC) -> ShardFile:
    return ShardFile(data, name="store/x.samples.arrow", schema=samples_schema(spec))


def long_sample(number: int, num_rows: int) -> LabelledSample:
    """A sample of repeated rows: quick to make, valid in shape (its labels are not checked)."""
    short = make_sample(number, SPEC, num_tokens=1)
    rows = {
        name: np.repeat(getattr(short, name), num_rows, axis=0)
        for name in LabelledSample.__dataclass_fields__
        if name.endswith(("_N", "_NK", "_R"))
    }
    return replace(short, **{**rows, "positions_N": np.arange(num_rows, dtype=np.int32)})


@pytest.fixture(scope="module")
def three_batches() -> ShardBytes:
    # 5 samples of 1500 rows: 3000, 3000, 1500
    return encode_shard([long_sample(number, ROWS_PER_SAMPLE) for number in range(5)], SPEC)


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << (bit % 8)
    return bytes(damaged)


def test_counts_are_of_samples_rows_and_response_tokens() -> None:
    # 12 samples of 3, 4, 5, 6 tokens in turn: 3 * (3 + 4 + 5 + 6) = 54
    assert (SHARD.num_samples, SHARD.num_rows, SHARD.num_tokens) == (12, 54, 54)


def test_the_same_samples_give_the_same_bytes() -> None:
    assert encode_shard(SAMPLES, SPEC) == SHARD


def test_labels_are_one_row_per_position_in_the_order_of_the_samples() -> None:
    labels = open_labels(SHARD.labels).table()
    samples = open_samples(SHARD.samples).table()
    lengths = [len(sample.response_ids_R) for sample in SAMPLES]
    assert labels["sample"].to_pylist() == np.repeat(np.arange(12), lengths).tolist()
    assert labels["position"].to_pylist() == [p for length in lengths for p in range(length)]
    assert samples["sample_key"].to_pylist() == [sample.key for sample in SAMPLES]
    assert samples["first_row"].to_pylist() == (np.cumsum(lengths) - lengths).tolist()
    assert samples["num_rows"].to_pylist() == lengths


def test_scalars_are_stored_exactly() -> None:
    labels = open_labels(SHARD.labels).table()
    for column, field in {
        "token_id": "response_ids_R",
        "token_logprob": "token_logprob_N",
        "token_rank": "token_rank_N",
        "log_tail_mass": "log_tail_mass_N",
        "entropy": "entropy_N",
    }.items():
        expected = np.concatenate([getattr(sample, field) for sample in SAMPLES])
        np.testing.assert_array_equal(labels[column].to_numpy(), expected)


def test_batches_end_where_a_sample_ends(three_batches: ShardBytes) -> None:
    batches = list(open_labels(three_batches.labels).batches())
    assert [batch.num_rows for batch in batches] == [3000, 3000, 1500]
    assert [batch["sample"].unique().to_pylist() for batch in batches] == [[0, 1], [2, 3], [4]]


def test_a_sample_longer_than_a_batch_is_a_batch_of_its_own() -> None:
    lengths = [3, BATCH_ROWS + 1, 3]
    shard = encode_shard([long_sample(n, length) for n, length in enumerate(lengths)], SPEC)
    assert [batch.num_rows for batch in open_labels(shard.labels).batches()] == lengths


@pytest.mark.parametrize("columns", [["entropy"], ["topk_dq_b1", "sample"], ["token_id"]])
def test_a_projection_holds_the_columns_that_were_asked_for(columns: list[str]) -> None:
    table = open_labels(SHARD.labels).table(columns)
    assert table.column_names == columns
    assert table.equals(open_labels(SHARD.labels).table().select(columns))


def test_a_projection_verifies_what_it_reads() -> None:
    """The first flip that damages entropy alone: entropy is refused, its neighbour is served."""
    whole = open_labels(SHARD.labels).table()
    generator = random.Random(0)
    for _ in range(1000):
        damaged = flipped(SHARD.labels, generator.randrange(len(SHARD.labels) * 8))
        try:
            rank = open_labels(damaged).table(["token_rank"])
            open_labels(damaged).table(["entropy"])
        except FormatError:
            continue
        except ShardCorruptError as error:
            if "column 'entropy'" in str(error):
                assert rank.equals(whole.select(["token_rank"]))
                return
    pytest.fail("no flip of 1000 hit the entropy column")


@pytest.mark.parametrize("file", ["labels", "samples"])
def test_no_flipped_bit_changes_a_value_that_is_served(file: str) -> None:
    """A flip is noticed, or harmless (padding, an unused field of the IPC framing)."""
    data: bytes = getattr(SHARD, file)
    open_file = {"labels": open_labels, "samples": open_samples}[file]
    whole, refused = open_file(data).table(), 0
    generator = random.Random(0)
    for _ in range(500):
        try:
            found = open_file(flipped(data, generator.randrange(len(data) * 8))).table()
        except (ShardCorruptError, FormatError):
            refused += 1
        else:
            assert found.equals(whole)
    assert refused > 250


def test_a_batch_in_the_place_of_another_is_refused(three_batches: ShardBytes) -> None:
    """The footer lists offsets of batches; here the second one points to the first batch.

    Both hold 3000 rows, so neither counts nor column checksums could tell.
    """
    data = three_batches.labels
    # the file ends with footer, its size in 4 bytes and the 6 bytes ARROW1
    footer_size = int.from_bytes(data[-10:-6], "little")
    footer = data[-10 - footer_size : -10]
    # 8 bytes of magic, then the schema: a marker and a size of 4 bytes each, then so many bytes
    first_batch = 16 + int.from_bytes(data[12:16], "little")
    start = footer.index(first_batch.to_bytes(8, "little"))
    # a block is 24 bytes: int64 offset, int32 size of the header, padding, int64 size of the body
    first, second = footer[start : start + 24], footer[start + 24 : start + 48]
    swapped = footer.replace(second, first)
    labels = open_labels(data[: -10 - footer_size] + swapped + data[-10:])
    assert labels.batch(0).num_rows == 3000
    with pytest.raises(ShardCorruptError, match="batch 0 stands where batch 1 should"):
        labels.batch(1)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(kept: float) -> None:
    with pytest.raises(ShardCorruptError, match=r"x\.labels\.arrow is not a complete Arrow IPC"):
        open_labels(SHARD.labels[: int(kept * len(SHARD.labels))])


def test_one_missing_byte_is_a_truncation() -> None:
    with pytest.raises(ShardCorruptError, match="not a complete Arrow IPC file"):
        open_labels(SHARD.labels[:-1])


def test_the_file_of_another_label_set_is_refused() -> None:
    """Same columns and k; only the key in the schema's metadata differs."""
    with pytest.raises(FormatError, match=r"does not have the schema of format 0.*wanted"):
        open_labels(SHARD.labels, make_spec(seed=1))


def test_the_other_file_of_the_same_shard_is_refused() -> None:
    with pytest.raises(FormatError, match="does not have the schema"):
        open_labels(SHARD.samples)


def test_a_file_without_checksums_is_refused() -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, labels_schema(SPEC)) as writer:
        writer.write_table(open_labels(SHARD.labels).table().cast(labels_schema(SPEC)))
    with pytest.raises(ShardCorruptError, match="batch 0 is unreadable"):
        open_labels(sink.getvalue().to_pybytes()).table()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2, 3], pa.int32()),
        pa.array([1.5, 2.5, -0.5], pa.float32()),
        pa.array(["a", None, "\u00e9"]),
        pa.array([True, False, None]),
        pa.array([[1, 2], None, []], pa.list_(pa.int32())),
        pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.uint8(), 2)),
    ],
    ids=lambda column: str(column.type),
)
def test_a_column_digest_is_of_values_not_of_buffers(column: pa.Array) -> None:
    padded = pa.concat_arrays([column, column]).slice(len(column))
    assert column_digest(padded) == column_digest(column)
    assert column_digest(column.slice(1)) != column_digest(column)
    assert column_digest(column.take(pa.array([1, 0, 2]))) != column_digest(column)


def test_equal_bytes_of_another_split_have_another_digest() -> None:
    assert column_digest(pa.array(["ab", "c"])) != column_digest(pa.array(["a", "bc"]))
    lists = pa.list_(pa.int32())
    assert column_digest(pa.array([[1], [2, 3]], lists)) != column_digest(
        pa.array([[1, 2], [3]], lists)
    )


# -- readers that know nothing of us ---------------------------------------------------------------
def row_by_pyarrow(path: Path, row: int) -> dict[str, object]:
    return pa.ipc.open_file(str(path)).read_all().slice(row, 1).to_pylist()[0]


def row_by_polars(path: Path, row: int) -> dict[str, object]:
    return pl.read_ipc(path).row(row, named=True)


def row_by_pandas(path: Path, row: int) -> dict[str, object]:
    return pd.read_feather(path).iloc[row].to_dict()


def row_by_duckdb(path: Path, row: int) -> dict[str, object]:
    labels = pyarrow.dataset.dataset(path, format="ipc")
    with duckdb.connect() as connection:
        connection.register("labels", labels)
        found = connection.execute("from labels order by sample, position limit 1 offset ?", [row])
        names = [column[0] for column in found.description]
        return dict(zip(names, found.fetchone(), strict=True))


@pytest.mark.parametrize("read_row", [row_by_pyarrow, row_by_polars, row_by_pandas, row_by_duckdb])
def test_other_readers_decode_a_row_by_the_recipe_of_the_format(
    tmp_path: Path, read_row: Callable[[Path, int], dict[str, object]]
) -> None:
    path = tmp_path / "x.labels.arrow"
    path.write_bytes(SHARD.labels)
    row = read_row(path, 4)  # sample 0 has 3 rows: row 4 is position 1 of sample 1
    planes = {name: np.array(row[name], dtype=np.int64) for name in row if name.startswith("topk_")}
    ids_K = planes["topk_id_b0"] + 256 * planes["topk_id_b1"] + 65536 * planes["topk_id_b2"]
    logprobs_K = -np.cumsum(planes["topk_dq_b0"] + 256 * planes["topk_dq_b1"]) / 256
    sample = SAMPLES[1]
    assert (row["sample"], row["position"]) == (1, 1)
    assert row["token_id"] == sample.response_ids_R[1]
    assert row["token_logprob"] == sample.token_logprob_N[1]
    assert row["log_tail_mass"] == sample.log_tail_mass_N[1]
    np.testing.assert_array_equal(ids_K, sample.topk_ids_NK[1])
    assert np.abs(logprobs_K - sample.topk_logprobs_NK[1]).max() <= 1 / 512


def test_other_readers_open_the_samples_file(tmp_path: Path) -> None:
    path = tmp_path / "x.samples.arrow"
    path.write_bytes(SHARD.samples)
    expected = [sample.key for sample in SAMPLES]
    assert pl.read_ipc(path)["sample_key"].to_list() == expected
    assert pd.read_feather(path)["sample_key"].tolist() == expected
    assert pd.read_feather(path)["prompt_ids"][3].tolist() == SAMPLES[3].prompt_ids_P.tolist()


def test_the_examples_of_the_format_document_hold() -> None:
    """They are plain Python with assertions, read from top to bottom."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "format.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(examples) == 4
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)  # our own document
