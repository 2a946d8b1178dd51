"""A shard is read as it was written, or not at all; and anybody's Arrow reader can open it."""

import random
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

from storage.columns import select_rows
from storage.errors import FormatError, ShardCorruptError, WrongLabelSetError
from storage.ipc import ArrowFile
from storage.keys import LabelSetSpec
from storage.samples import LabelledSample
from storage.schema import labels_schema, samples_schema
from storage.shard import BATCH_ROWS, ShardBytes, ShardReader, encode_shard
from storage.testing import make_sample, make_spec

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC, num_tokens=3 + number % 4) for number in range(12)]
SHARD = encode_shard(SAMPLES, SPEC)

ROWS_PER_SAMPLE = BATCH_ROWS * 3 // 8
"""Two samples of this size fit a batch, three do not."""


def open_labels(data: bytes, spec: LabelSetSpec = SPEC) -> ArrowFile:
    return ArrowFile(data, name="store/x.labels.arrow", schema=labels_schema(spec))


def open_samples(data: bytes, spec: LabelSetSpec = SPEC) -> ArrowFile:
    return ArrowFile(data, name="store/x.samples.arrow", schema=samples_schema(spec))


def open_shard(
    labels: bytes, samples: bytes, batch_rows: tuple[int, ...] = SHARD.batch_rows
) -> ShardReader:
    files = (open_labels(labels), open_samples(samples))
    return ShardReader(*files, SPEC, batch_rows, name="store/x")


def long_sample(number: int, num_rows: int) -> LabelledSample:
    """A sample of repeated rows: quick to make, valid in shape (its labels are not checked)."""
    short = make_sample(number, SPEC, num_tokens=1)
    rows = {
        name: np.repeat(getattr(short, name), num_rows, axis=0)
        for name in LabelledSample.__dataclass_fields__
        if name.endswith(("_N", "_NK", "_R"))
    }
    rows["optional"] = select_rows(short.optional, np.zeros(num_rows, dtype=np.int64))
    return replace(short, **{**rows, "positions_N": np.arange(num_rows, dtype=np.int32)})


@pytest.fixture(scope="module")
def three_batches() -> ShardBytes:
    # 5 samples: 2, 2, 1
    return encode_shard([long_sample(number, ROWS_PER_SAMPLE) for number in range(5)], SPEC)


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << (bit % 8)
    return bytes(damaged)


def test_counts_are_of_samples_rows_and_response_tokens() -> None:
    # 12 samples of 3, 4, 5, 6 tokens in turn: 3 * (3 + 4 + 5 + 6) = 54
    assert (SHARD.num_samples, SHARD.num_rows, SHARD.num_tokens) == (12, 54, 54)
    assert SHARD.batch_rows == (54,)


def test_the_same_samples_give_the_same_bytes() -> None:
    again = encode_shard(SAMPLES, SPEC)
    assert (again.labels, again.samples) == (SHARD.labels, SHARD.samples)


def test_labels_are_one_row_per_position_in_the_order_of_the_samples() -> None:
    labels = open_labels(SHARD.labels).table()
    samples = open_samples(SHARD.samples).table()
    lengths = [len(sample.response_ids_R) for sample in SAMPLES]
    starts = (np.cumsum(lengths) - lengths).tolist()
    assert labels["sample"].to_pylist() == np.repeat(np.arange(12), lengths).tolist()
    assert labels["position"].to_pylist() == [p for length in lengths for p in range(length)]
    assert samples["sample_key"].to_pylist() == [sample.key for sample in SAMPLES]
    assert samples["first_row"].to_pylist() == SHARD.first_rows.tolist() == starts
    assert samples["num_rows"].to_pylist() == samples["num_tokens"].to_pylist() == lengths


def test_a_sample_begins_like_its_prompt_in_the_samples_file() -> None:
    table = open_samples(SHARD.samples).table(["sample_key", "prompt_key"])
    for row, sample in zip(table.to_pylist(), SAMPLES, strict=True):
        assert row["prompt_key"] == sample.prompt_key
        assert row["sample_key"][:8] == row["prompt_key"][:8]


def test_the_schema_names_the_request_and_the_units() -> None:
    metadata = pa.ipc.open_file(pa.py_buffer(SHARD.labels)).schema.metadata
    assert metadata[b"distillcache.format"] == b"1"
    assert metadata[b"distillcache.label_set"] == SPEC.key.encode()
    assert metadata[b"distillcache.logprob_steps_per_nat"] == b"256"
    assert LabelSetSpec.model_validate_json(metadata[b"distillcache.spec"]) == SPEC


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
    lengths = [2 * ROWS_PER_SAMPLE, 2 * ROWS_PER_SAMPLE, ROWS_PER_SAMPLE]
    assert [batch.num_rows for batch in batches] == lengths
    assert list(three_batches.batch_rows) == lengths
    assert [batch["sample"].unique().to_pylist() for batch in batches] == [[0, 1], [2, 3], [4]]


def test_a_sample_longer_than_a_batch_is_a_batch_of_its_own() -> None:
    lengths = [3, BATCH_ROWS + 1, 3]
    shard = encode_shard([long_sample(n, length) for n, length in enumerate(lengths)], SPEC)
    assert [batch.num_rows for batch in open_labels(shard.labels).batches()] == lengths


def test_a_batch_is_read_with_the_facts_of_its_own_samples(three_batches: ShardBytes) -> None:
    reader = open_shard(three_batches.labels, three_batches.samples, three_batches.batch_rows)
    rows = [[row for row, _ in reader.batch(number)] for number in range(3)]
    assert rows == [[0, 1], [2, 3], [4]]
    (_, found), *_ = reader.batch(2)
    assert found.key == make_sample(4, SPEC).key
    assert len(found.positions_N) == ROWS_PER_SAMPLE


def test_facts_are_found_across_batches_of_the_samples_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """12 samples in batches of 5: 5, 5 and 2."""
    monkeypatch.setattr("storage.shard.SAMPLES_BATCH_ROWS", 5)
    shard = encode_shard(SAMPLES, SPEC)
    assert open_samples(shard.samples).num_batches == 3
    reader = open_shard(shard.labels, shard.samples)
    assert [sample.key for _, sample in reader.batch(0)] == [sample.key for sample in SAMPLES]


@pytest.mark.parametrize("columns", [["entropy"], ["topk_dq_b1", "sample"], ["token_id"]])
def test_a_projection_holds_the_columns_that_were_asked_for(columns: list[str]) -> None:
    table = open_labels(SHARD.labels).table(columns)
    assert table.column_names == columns
    assert table.equals(open_labels(SHARD.labels).table().select(columns))


# -- files that do not fit -------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["labels", "samples"])
def test_no_flipped_bit_changes_a_sample_that_is_served(file: str) -> None:
    """A flip is noticed, or harmless (padding, an unused field of the IPC framing)."""
    files = {"labels": SHARD.labels, "samples": SHARD.samples}
    whole = [repr(sample) for _, sample in open_shard(**files).batch(0)]
    generator, refused = random.Random(0), 0
    for _ in range(200):
        damaged = flipped(files[file], generator.randrange(len(files[file]) * 8))
        try:
            found = open_shard(**{**files, file: damaged}).batch(0)
        except (ShardCorruptError, FormatError):
            refused += 1
        else:
            assert [repr(sample) for _, sample in found] == whole
    assert refused > 100


def test_the_file_of_another_label_set_is_refused() -> None:
    """Same columns and k; only the request in the schema's metadata differs."""
    other = make_spec(seed=1)
    with pytest.raises(FormatError):
        open_labels(SHARD.labels, other)
    renamed = labels_schema(SPEC).metadata | {b"distillcache.label_set": other.key.encode()}
    with pytest.raises(WrongLabelSetError, match=f"belongs to label set .*{SPEC.key}"):
        ArrowFile(SHARD.labels, name="x", schema=labels_schema(SPEC).with_metadata(renamed))


def test_the_other_file_of_the_same_shard_is_refused() -> None:
    with pytest.raises(FormatError, match="does not have the schema"):
        open_labels(SHARD.samples)


@pytest.mark.parametrize("batch_rows", [(), (53,), (55,), (27, 27)])
def test_batches_of_other_lengths_than_recorded_are_refused(batch_rows: tuple[int, ...]) -> None:
    with pytest.raises(ShardCorruptError, match="its record says"):
        open_shard(SHARD.labels, SHARD.samples, batch_rows).batch(0)


def test_a_samples_file_with_fewer_samples_is_refused() -> None:
    shorter = encode_shard(SAMPLES[:-1], SPEC)
    with pytest.raises(ShardCorruptError, match="has rows of sample 11, which the samples file"):
        open_shard(SHARD.labels, shorter.samples).batch(0)


def test_a_samples_file_of_other_lengths_is_refused() -> None:
    shifted = encode_shard(SAMPLES[1:] + SAMPLES[:1], SPEC)
    with pytest.raises(ShardCorruptError, match="has 3 label rows, its samples file says 4"):
        open_shard(SHARD.labels, shifted.samples).batch(0)


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
