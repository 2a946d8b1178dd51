"""Every kind of damage is found, named with its file, and told from what can be recovered."""

from pathlib import Path

import pyarrow as pa
import pytest

from storage.compact import compact
from storage.errors import ShardCorruptError
from storage.garbage import drop
from storage.ipc import encode_file
from storage.records import FileRecord
from storage.repair import repair
from storage.schema import samples_schema
from storage.shard_table import names_of, shard_table_path
from storage.testing import make_sample, make_spec
from storage.verify import Problem, verify

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC) for number in range(9)]


@pytest.fixture
def store(bench, monkeypatch: pytest.MonkeyPatch):
    """Three commits of three samples; the first two are also summed up in a merged record."""
    monkeypatch.setattr("storage.log.MERGE_FACTOR", 2)
    bench.filled(SAMPLES[:3], SAMPLES[3:6], SAMPLES[6:])
    return bench


def problems(bench) -> list[Problem]:
    return list(bench.fresh().verify())


def third(store, table: str) -> Path:
    """A file of the third commit."""
    record = store.fresh().log.single(3)
    label_set = store.fresh()
    if table == "index":
        return store.root / label_set.index_path(record.index.name)
    return store.root / label_set.shard_path(record.shards[0].name, table)


def test_an_undamaged_set_has_no_problem(store) -> None:
    assert problems(store) == []
    compact(store.fresh(), {})
    assert problems(store) == []


def test_an_empty_or_dropped_set_has_no_problem(bench) -> None:
    label_set = bench.create()
    assert list(label_set.verify()) == []
    label_set.append(SAMPLES, {})
    drop(label_set, {})
    assert list(label_set.verify()) == []


def test_everything_that_is_served_is_read(store) -> None:
    seen = []
    assert list(verify(store.fresh(), advance=seen.append)) == []
    assert sum(seen) == store.fresh().totals().num_bytes
    assert len(seen) == 3


@pytest.mark.parametrize("table", ["labels", "samples"])
@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "longer"])
def test_a_damaged_shard_is_found(store, table: str, how: str) -> None:
    path = third(store, table)
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-1])
    elif how == "flipped":
        store.damage(path, byte=len(data) // 2)
    else:
        path.write_bytes(data + b"\0")
    (problem,) = problems(store)
    assert (problem.what, problem.lost_samples) == ("shard", 3)
    assert problem.name == path.name.partition(".")[0]
    assert path.name in problem.error


def test_every_flipped_bit_of_a_shard_is_found(store) -> None:
    """Also those that no reader would notice, such as padding: 50 places of each file."""
    for table in ("labels", "samples"):
        path = third(store, table)
        whole = path.read_bytes()
        for byte in range(0, len(whole), len(whole) // 25):
            store.damage(path, byte=byte)
            assert [problem.what for problem in problems(store)] == ["shard"]
            path.write_bytes(whole)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_a_damaged_index_is_found_and_loses_nothing(store, how: str) -> None:
    path = third(store, "index")
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        store.damage(path)
    (problem,) = problems(store)
    assert (problem.what, problem.lost_samples) == ("index", 0)
    assert problem.name == third(store, "labels").name.partition(".")[0]
    assert problem.path.endswith(path.name)


def test_a_damaged_merged_index_is_found_for_each_of_its_shards(store) -> None:
    label_set = store.fresh()
    merged = label_set.log.merged(1, 2)
    store.damage(store.root / label_set.index_path(merged.indexes[0].name))
    found = problems(store)
    assert [problem.what for problem in found] == ["index", "index"]
    assert {problem.name for problem in found} == set(names_of(label_set.log.shards(merged)))


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_without_its_shard_table_a_merged_record_is_no_use(store, how: str) -> None:
    """Whoever needs a shard is told so; ``repair`` goes back to the records that it sums up."""
    label_set = store.fresh()
    merged = label_set.log.merged(1, 2)
    path = store.root / shard_table_path(label_set.prefix, merged.merged_shards.name)
    if how == "missing":
        path.unlink()
    else:
        store.damage(path)
    with pytest.raises(ShardCorruptError, match="distill repair"):
        store.fresh().totals()
    (problem,) = problems(store)
    assert (problem.what, problem.lost_samples) == ("merged", 0)
    assert problem.path == label_set.log.path(1, 2)
    repaired = repair(store.fresh(), [problem], {})
    assert (repaired.deleted, repaired.quarantined) == ([problem.path], [])
    assert problems(store) == []
    store.assert_serves(SAMPLES, SAMPLES)


def test_the_index_of_a_record_that_was_merged_is_not_needed(store) -> None:
    label_set = store.fresh()
    (store.root / label_set.index_path(label_set.log.single(1).index.name)).unlink()
    assert problems(store) == []


@pytest.mark.parametrize("how", ["missing", "empty", "edited"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_record_is_found_although_a_merged_one_covers_it(
    store, number: int, how: str
) -> None:
    spoil_record(store, number, how)
    (problem,) = problems(store)
    assert (problem.what, problem.number) == ("record", number)
    assert problem.path.endswith(f"{number:08d}.json")


@pytest.mark.parametrize("how", ["empty", "edited"])
def test_a_damaged_last_record_is_found(store, how: str) -> None:
    """One that is missing at the end cannot be: nothing tells that it existed."""
    spoil_record(store, 3, how)
    (problem,) = problems(store)
    assert (problem.what, problem.number) == ("record", 3)


def spoil_record(store, number: int, how: str) -> None:
    path = store.folder() / "commits" / f"{number:08d}.json"
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        store.edit(path, lambda document: document.update(created_at="later"), sign=False)


def test_a_damaged_merged_record_is_found(store) -> None:
    (path,) = store.files("merged/*")
    path.write_bytes(path.read_bytes()[:-9])
    (problem,) = problems(store)
    assert (problem.what, problem.lost_samples) == ("merged", 0)
    assert problem.path.endswith("merged/00000001-00000002.json")


def test_several_problems_are_found_at_once(store) -> None:
    third(store, "labels").unlink()
    store.files("merged/*")[0].write_bytes(b"{}")
    spoil_record(store, 2, "edited")
    assert sorted(problem.what for problem in problems(store)) == ["merged", "record", "shard"]


# -- files that are consistent with themselves, but not with each other ----------------------------
def forge_samples(store, change) -> None:
    """Rewrite the samples file of the third commit, with right checksums everywhere."""
    label_set = store.fresh()
    record = label_set.log.single(3)
    path = third(store, "samples")
    table = label_set.open_table(record.shards[0], "samples").table()
    rows = table.to_pylist()
    change(rows)
    schema = samples_schema(SPEC)
    data = encode_file([pa.RecordBatch.from_pylist(rows, schema=schema)], schema)
    path.write_bytes(data)
    stated = FileRecord.of(data).model_dump()
    store.edit(
        store.folder() / "commits" / "00000003.json",
        lambda document: document["shards"][0].update(samples=stated),
    )


@pytest.mark.parametrize(
    "column", ["sample_key", "prompt_key", "sample_index", "first_row", "num_rows", "num_tokens"]
)
def test_a_samples_file_that_does_not_fit_its_labels_is_found(store, column: str) -> None:
    def change(rows: list[dict]) -> None:
        value = rows[1][column]
        rows[1][column] = "f" * 32 if isinstance(value, str) else value + 1

    forge_samples(store, change)
    assert [problem.what for problem in problems(store)] == ["shard"]


def test_batches_of_other_lengths_than_recorded_are_found(store) -> None:
    """Readers find a sample's batch by these numbers; 3 samples of 5 rows are one batch of 15."""
    store.edit(
        store.folder() / "commits" / "00000003.json",
        lambda document: document["shards"][0].update(batch_rows=[5, 10]),
    )
    assert [problem.what for problem in problems(store)] == ["shard"]
