"""Optional columns: stored and read as they were, or refused by name."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.columns import arrow_columns, encode_columns, select_rows
from storage.errors import (
    BadLabelError,
    MassError,
    NotFiniteError,
    UnsortedError,
    VocabularyError,
)
from storage.ipc import ArrowFile, encode_file
from storage.keys import (
    ColumnSpec,
    CountsSpec,
    MassSpec,
    StratifiedSpec,
    ThresholdSpec,
    canonical_columns,
)
from storage.labels.base import UNUSED_ID
from storage.samples import LabelledSample
from storage.schema import labels_schema, samples_schema
from storage.shard import ShardReader, encode_shard
from storage.testing import make_sample, make_spec
from storage.writer import publish, write_shard

SAMPLED = [StratifiedSpec(draws=3), ThresholdSpec(threshold=0.04), CountsSpec(draws=12)]
NAMES = ("entropy", "power_sum_10", "power_sum_200", "power_sum_400", "power_sums")
EVERYTHING = make_spec(columns=(*NAMES, StratifiedSpec(draws=3)))

COLUMNS = st.builds(
    lambda names, sampled: canonical_columns([*names, *sampled]),
    st.lists(st.sampled_from(NAMES), unique=True),
    st.lists(st.sampled_from(SAMPLED), max_size=1),
)


# -- on disk ---------------------------------------------------------------------------------------
def test_arrow_columns_have_one_order() -> None:
    assert arrow_columns(EVERYTHING) == [
        "entropy",
        "log_power_sum_10",
        "log_power_sum_200",
        "log_power_sum_400",
        "log_power_sum_25",
        "log_power_sum_50",
        "log_power_sum_75",
        "power_slope_25",
        "power_slope_50",
        "power_slope_75",
        "tail_ids",
        "tail_weights",
    ]
    names = labels_schema(EVERYTHING).names
    first = names.index("log_tail_mass") + 1
    assert names[first : first + 12] == arrow_columns(EVERYTHING)
    assert names[first + 12] == "topk_id_b0"


@given(COLUMNS, st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans())
def test_a_shard_gives_back_every_column(
    benches, columns: tuple[ColumnSpec, ...], lengths: list[int], adaptive: bool
) -> None:
    """Samples differ in length and in how many tail samples their rows have, down to none."""
    kind = MassSpec(mass=0.7, cap=8) if adaptive else None
    spec = make_spec(columns=columns, kind=kind)
    samples = [make_sample(n, spec, num_tokens=length) for n, length in enumerate(lengths)]
    if spec.tail_samples is not None:
        samples[0] = without_tail_samples(samples[0])
    shard = encode_shard(samples, spec)
    reader = ShardReader(
        ArrowFile(shard.labels, name="labels", schema=labels_schema(spec)),
        ArrowFile(shard.samples, name="samples", schema=samples_schema(spec)),
        spec,
        shard.batch_rows,
        name="shard",
    )
    found, bench = reader.batch(0), benches()
    assert [row for row, _ in found] == list(range(len(samples)))
    for (_, sample), expected in zip(found, samples, strict=True):
        bench.assert_same(sample, expected)
        sample.check(spec, stored=True)


def without_tail_samples(sample: LabelledSample) -> LabelledSample:
    none = {"tail_ids": np.int32, "tail_weights": np.float32}
    empty = {name: np.zeros((len(sample.positions_N), 0), dtype) for name, dtype in none.items()}
    return replace(sample, optional={**sample.optional, **empty})


@pytest.mark.parametrize("sampled", SAMPLED, ids=str)
def test_a_store_serves_exports_and_verifies_tail_samples(bench, sampled) -> None:
    spec = make_spec(columns=(*NAMES, sampled))
    samples = [make_sample(number, spec, num_tokens=2 + number) for number in range(4)]
    label_set = bench.filled(samples[:2], samples[2:], spec=spec)
    bench.assert_serves(samples, spec=spec)
    table = label_set.to_arrow(["sample_key", "position", "tail_ids", "tail_weights"])
    by_key = {sample.key: sample for sample in samples}
    for row in table.to_pylist():
        sample, n = by_key[row["sample_key"]], row["position"]
        used = sample.optional["tail_ids"][n] != UNUSED_ID
        assert row["tail_ids"] == sample.optional["tail_ids"][n][used].tolist()
        assert row["tail_weights"] == sample.optional["tail_weights"][n][used].tolist()


def test_a_flipped_bit_of_a_list_column_is_noticed() -> None:
    """Ids and weights are covered by the digest of their column, as every other value."""
    batch = pa.RecordBatch.from_arrays(
        encode_columns([make_sample(1, EVERYTHING).optional], EVERYTHING),
        names=arrow_columns(EVERYTHING),
    )
    data = encode_file([batch], batch.schema)
    with ArrowFile(data, name="x", schema=batch.schema) as file:
        assert file.batch(0).equals(batch)
    weights = batch["tail_weights"].flatten().to_numpy().copy()
    weights[3] = np.nextafter(weights[3], np.float32(1))
    other = pa.ListArray.from_arrays(batch["tail_weights"].offsets, pa.array(weights))
    changed = batch.set_column(batch.num_columns - 1, batch.schema.field("tail_weights"), other)
    assert digests(changed)[:-1] == digests(batch)[:-1]
    assert digests(changed)[-1] != digests(batch)[-1]


def digests(batch: pa.RecordBatch) -> list[str]:
    data = encode_file([batch], batch.schema)
    _, metadata = pa.ipc.open_file(data).get_batch_with_custom_metadata(0)
    return metadata["distillcache.xxh3"].decode().split()


def test_selected_rows_are_as_wide_as_the_widest_of_them() -> None:
    ids = np.array([[1, 2, 3], [4, -1, -1], [-1, -1, -1]], np.int32)
    weights = np.where(ids == UNUSED_ID, 0, 0.1).astype(np.float32)
    entropy = np.arange(3, dtype=np.float32)
    optional = {"entropy": entropy, "tail_ids": ids, "tail_weights": weights}
    for rows, width in (([0, 1], 3), ([1, 2], 1), ([2], 0), (slice(1, None), 1)):
        found = select_rows(optional, rows)
        assert found["tail_ids"].shape == found["tail_weights"].shape == (len(ids[rows]), width)
        np.testing.assert_array_equal(found["tail_ids"], ids[rows][:, :width])
        np.testing.assert_array_equal(found["entropy"], entropy[rows])


# -- refusals --------------------------------------------------------------------------------------
Change = Callable[[LabelledSample], LabelledSample]


def with_column(name: str, row: int | tuple[int, int], value: float) -> Change:
    """One row (or cell) of an optional column has another value."""

    def change(sample: LabelledSample) -> LabelledSample:
        values = sample.optional[name].copy()
        values[row] = value
        return replace(sample, optional={**sample.optional, name: values})

    return change


def swapped(sample: LabelledSample) -> LabelledSample:
    ids = sample.optional["tail_ids"].copy()
    ids[3, :2] = ids[3, 1::-1]
    return replace(sample, optional={**sample.optional, "tail_ids": ids})


REFUSED: dict[str, tuple[Change, type[BadLabelError], str]] = {
    "NaN power sum": (
        with_column("log_power_sum_50", 3, np.nan),
        NotFiniteError,
        "log_power_sum_50 is not finite",
    ),
    "negative power sum": (
        with_column("log_power_sum_10", 3, -0.03),
        BadLabelError,
        "log_power_sum_10 leaves its bounds",
    ),
    # 0.25 * log(2**20) = 3.47
    "power sum of too large a vocabulary": (
        with_column("log_power_sum_75", 3, 3.5),
        BadLabelError,
        "log_power_sum_75 leaves its bounds 0 and 3.47",
    ),
    "positive power sum above 1": (
        with_column("log_power_sum_200", 3, 0.03),
        BadLabelError,
        "log_power_sum_200 leaves its bounds 0 and -13.86",
    ),
    # -3 * log(2**20) = -41.59
    "power sum above 1 of too large a vocabulary": (
        with_column("log_power_sum_400", 3, -41.7),
        BadLabelError,
        "log_power_sum_400 leaves its bounds 0 and -41.59",
    ),
    "rising power sum": (
        with_column("power_slope_25", 3, 0.1),
        BadLabelError,
        "power_slope_25 is no slope",
    ),
    "too steep a power sum": (
        with_column("power_slope_75", 3, -40.0),
        BadLabelError,
        "power_slope_75 is no slope",
    ),
    "infinite slope": (with_column("power_slope_25", 3, -np.inf), NotFiniteError, "not finite"),
    "NaN weight": (
        with_column("tail_weights", (3, 0), np.nan),
        NotFiniteError,
        "a tail weight is not finite",
    ),
    "negative weight": (
        with_column("tail_weights", (3, 0), -1e-3),
        BadLabelError,
        "a tail weight is negative",
    ),
    "too much weight": (
        with_column("tail_weights", (3, 0), 0.9),
        MassError,
        "tail weights add up to more than what they cover",
    ),
    "id at the vocabulary's size": (
        with_column("tail_ids", (3, 2), 100),
        VocabularyError,
        "a sampled id leaves the vocabulary 100",
    ),
    "negative id": (with_column("tail_ids", (3, 0), -2), VocabularyError, "a sampled id leaves"),
    "unsorted ids": (swapped, UnsortedError, "sampled ids do not ascend"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_columns_that_cannot_be_are_never_written(what: str) -> None:
    change, error, message = REFUSED[what]
    sample = make_sample(0, EVERYTHING)
    assert (sample.optional["tail_ids"][3] >= 0).all()
    with pytest.raises(error, match=f"{message}.*at labelled position 3") as found:
        change(sample).check(EVERYTHING)
    assert found.type is error


@pytest.mark.parametrize("what", REFUSED)
def test_columns_that_cannot_be_are_refused_on_reading_and_by_verify(bench, what: str) -> None:
    change, error, _ = REFUSED[what]
    samples = [make_sample(number, EVERYTHING) for number in range(3)]
    label_set = bench.create(EVERYTHING)
    publish(label_set, [write_shard(label_set, [change(samples[0]), *samples[1:]])], provenance={})
    with pytest.raises(error):
        list(bench.fresh(EVERYTHING).read([sample.key for sample in samples]))
    assert [problem.lost_samples for problem in bench.fresh(EVERYTHING).verify()] == [3]


def repeated_id(sample: LabelledSample) -> LabelledSample:
    """A stored id is also a sample of the tail, in its place of the order."""
    ids = sample.optional["tail_ids"].copy()
    ids[3] = np.sort(np.append(ids[3, :2], sample.topk_ids_NK[3, 0]))
    return replace(sample, optional={**sample.optional, "tail_ids": ids})


def test_a_sample_of_the_tail_is_no_stored_id() -> None:
    with pytest.raises(BadLabelError, match="a sample of the tail is among the stored ids at lab"):
        repeated_id(make_sample(0, EVERYTHING)).check(EVERYTHING)


def test_counts_cover_stored_ids_too() -> None:
    spec = make_spec(columns=(CountsSpec(draws=40),))
    sample = make_sample(0, spec)
    assert np.isin(sample.optional["tail_ids"][3], sample.topk_ids_NK[3]).any()
    sample.check(spec)


def without(name: str) -> Change:
    return lambda s: replace(s, optional={n: v for n, v in s.optional.items() if n != name})


def replaced(**columns: np.ndarray) -> Change:
    return lambda s: replace(s, optional={**s.optional, **columns})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("power_slope_50"), "power_slope_50 was requested and is missing"),
        (without("tail_weights"), "tail_weights was requested and is missing"),
        (replaced(log_power_sum_10=np.zeros(4, np.float32)), r"has shape \(4,\), not \(5,\)"),
        (replaced(tail_ids=np.zeros((5, 2), np.int32)), r"shapes \(5, 2\) and \(5, 3\)"),
        (
            replaced(tail_ids=np.zeros(5, np.int32), tail_weights=np.zeros(5, np.float32)),
            r"not twice \(5, M\)",
        ),
        (
            replaced(
                tail_ids=np.tile(np.arange(90, 94, dtype=np.int32), (5, 1)),
                tail_weights=np.zeros((5, 4), np.float32),
            ),
            "more than 3 tail samples at labelled position 0",
        ),
        (
            replaced(
                tail_ids=np.tile(np.array([-1, 95], np.int32), (5, 1)),
                tail_weights=np.zeros((5, 2), np.float32),
            ),
            "an unused tail sample stands before a used one",
        ),
        (
            replaced(
                tail_ids=np.full((5, 1), UNUSED_ID, np.int32),
                tail_weights=np.full((5, 1), 0.1, np.float32),
            ),
            "an unused tail sample has a weight",
        ),
    ],
)
def test_columns_of_another_form_are_refused(change: Change, message: str) -> None:
    with pytest.raises(BadLabelError, match=message):
        change(make_sample(0, EVERYTHING)).check(EVERYTHING)


def test_more_columns_than_requested_are_not_stored() -> None:
    sample = make_sample(0, EVERYTHING)
    sample.check(make_spec())
    spec = make_spec(columns=())
    assert (
        encode_shard([sample], spec).labels
        == encode_shard([replace(sample, optional={})], spec).labels
    )


# -- lists that do not fit, with every checksum right ----------------------------------------------
def rewritten(changed: dict[str, pa.Array]) -> ShardReader:
    samples = [make_sample(number, EVERYTHING) for number in range(2)]
    shard = encode_shard(samples, EVERYTHING)
    schema = labels_schema(EVERYTHING)
    with ArrowFile(shard.labels, name="labels", schema=schema) as file:
        batch = file.batch(0)
    columns = [changed.get(name, batch[name]) for name in batch.schema.names]
    labels = encode_file([pa.RecordBatch.from_arrays(columns, schema=schema)], schema)
    return ShardReader(
        ArrowFile(labels, name="labels", schema=schema),
        ArrowFile(shard.samples, name="samples", schema=samples_schema(EVERYTHING)),
        EVERYTHING,
        shard.batch_rows,
        name="shard",
    )


def lists(lengths: list[int], kind: pa.DataType) -> pa.Array:
    return pa.array([[0] * length for length in lengths], pa.list_(kind))


def test_lists_of_different_lengths_are_refused() -> None:
    reader = rewritten(
        {
            "tail_ids": lists([3] * 10, pa.int32()),
            "tail_weights": lists([3] * 9 + [2], pa.float32()),
        }
    )
    with pytest.raises(BadLabelError, match="lists of different lengths"):
        reader.batch(0)


def test_a_list_longer_than_its_method_allows_is_refused() -> None:
    """Before a rectangle of that width would be made for every row."""
    lengths = [3] * 9 + [2**20]
    reader = rewritten(
        {"tail_ids": lists(lengths, pa.int32()), "tail_weights": lists(lengths, pa.float32())}
    )
    with pytest.raises(BadLabelError, match="more than 3 tail samples at labelled position 9"):
        reader.batch(0)
