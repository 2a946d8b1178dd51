"""What somebody wrote on purpose, with every checksum right, is refused by its own error class."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from storage.errors import (
    BadLabelError,
    EditedSpecError,
    FormatError,
    LabelStoreError,
    MassError,
    NotFiniteError,
    UnsafePathError,
    UnsortedError,
    VocabularyError,
    WrongLabelSetError,
    WrongMagicError,
)
from storage.index import INDEX_SCHEMA
from storage.ipc import encode_file
from storage.label_set import LabelSet
from storage.records import FileRecord
from storage.samples import LabelledSample
from storage.testing import make_sample, make_spec
from storage.writer import publish, write_shard

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC) for number in range(4)]
KEYS = [sample.key for sample in SAMPLES]


def record_of(bench) -> Path:
    return bench.files("commits/*")[0]


def read_all(bench) -> list[LabelledSample]:
    return list(bench.fresh().read(KEYS))


# -- names -----------------------------------------------------------------------------------------
UNSAFE = [
    "../../../secret",
    "..",
    ".",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "A",
    "",
    "a\0",
    "x.arrow",
    "é",
]


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("place", ["shard", "index", "removed", "deleted"])
def test_a_name_that_might_lead_out_of_the_store_is_refused(bench, place: str, name: str) -> None:
    bench.filled(SAMPLES)

    def rename(document: dict) -> None:
        if place == "shard":
            document["shards"][0]["name"] = name
        elif place == "index":
            document["index"]["name"] = name
        else:
            document[place] = [name]

    bench.edit(record_of(bench), rename)
    with pytest.raises(UnsafePathError, match="it might lead out of the store"):
        bench.fresh().refresh()
    assert [problem.what for problem in bench.fresh().verify()] == ["record"]


# -- labels ----------------------------------------------------------------------------------------
def with_row(name: str, value: float) -> Callable[[LabelledSample], LabelledSample]:
    """Row 3 of a column has another value."""

    def change(sample: LabelledSample) -> LabelledSample:
        array = getattr(sample, name).copy()
        array[3] = value
        return replace(sample, **{name: array})

    return change


def with_nan_entropy(sample: LabelledSample) -> LabelledSample:
    entropy = sample.optional["entropy"].copy()
    entropy[3] = np.nan
    return replace(sample, optional={"entropy": entropy})


def other_id(sample: LabelledSample) -> LabelledSample:
    ids = sample.topk_ids_NK.copy()
    ids[3, 0] = 100
    return replace(sample, topk_ids_NK=ids)


LABELS: dict[str, tuple[Callable[[LabelledSample], LabelledSample], type[LabelStoreError]]] = {
    "NaN": (with_row("token_logprob_N", np.nan), NotFiniteError),
    "NaN entropy": (with_nan_entropy, NotFiniteError),
    "an infinite tail": (with_row("log_tail_mass_N", -np.inf), NotFiniteError),
    "mass above one": (with_row("log_tail_mass_N", 0.0), MassError),
    "mass below one": (with_row("log_tail_mass_N", -100.0), MassError),
    "a token beyond the vocabulary": (with_row("response_ids_R", 100), VocabularyError),
    "a negative token": (with_row("response_ids_R", -1), VocabularyError),
    "a top-k id beyond the vocabulary": (other_id, VocabularyError),
}


@pytest.mark.parametrize("what", LABELS)
def test_labels_that_cannot_be_are_refused_on_reading_and_by_verify(bench, what: str) -> None:
    """Reading serves no sample of the batch; verify counts all of the shard as lost."""
    change, error = LABELS[what]
    label_set = bench.create()
    shard = write_shard(label_set, [SAMPLES[0], change(SAMPLES[1]), *SAMPLES[2:]])
    publish(label_set, [shard], provenance={})
    with pytest.raises(error):
        read_all(bench)
    assert issubclass(error, BadLabelError)
    assert [problem.lost_samples for problem in bench.fresh().verify()] == [4]


@pytest.mark.parametrize("what", LABELS)
def test_labels_that_cannot_be_are_never_written(bench, what: str) -> None:
    change, error = LABELS[what]
    with pytest.raises(error):
        bench.create().append([change(SAMPLES[0])], {})


def test_what_is_unsorted_cannot_be_encoded(bench) -> None:
    falling = SAMPLES[0].topk_logprobs_NK[:, ::-1].copy()
    unsorted = replace(SAMPLES[0], topk_logprobs_NK=falling)
    with pytest.raises(UnsortedError):
        bench.create().append([unsorted], {})
    with pytest.raises(UnsortedError):
        write_shard(bench.create(), [unsorted])


def repeated(sample: LabelledSample) -> LabelledSample:
    ids = sample.topk_ids_NK.copy()
    ids[3, 7] = ids[3, 0]
    return replace(sample, topk_ids_NK=ids)


DEEPER: dict[str, Callable[[LabelledSample], LabelledSample]] = {
    "an id twice": repeated,
    "a rank of zero": with_row("token_rank_N", 0),
    "a prompt of another key": lambda s: replace(s, prompt_ids_P=s.prompt_ids_P + np.int32(1)),
    "another log-prob of the token": with_row("token_logprob_N", -0.001),
}


@pytest.mark.parametrize("what", DEEPER)
def test_verify_looks_deeper_than_a_reader(bench, what: str) -> None:
    label_set = bench.create()
    publish(label_set, [write_shard(label_set, [DEEPER[what](SAMPLES[0])])], provenance={})
    (problem,) = bench.fresh().verify()
    assert (problem.what, problem.lost_samples) == ("shard", 1)


# -- files in the place of others ------------------------------------------------------------------
def replace_file(bench, path: Path, data: bytes, table: str) -> None:
    """Other bytes, and a record that fits them."""
    path.write_bytes(data)
    stated = FileRecord.of(data).model_dump()

    def change(document: dict) -> None:
        if table == "index":
            document["index"]["file"] = stated
        else:
            document["shards"][0][table] = stated

    bench.edit(record_of(bench), change)


def test_the_shard_of_another_set_is_refused(bench) -> None:
    """Sets of two seeds have schemas that differ in the request that they name."""
    other = make_spec(seed=1)
    bench.filled(SAMPLES)
    bench.filled(SAMPLES, spec=other)
    for table in ("labels", "samples"):
        (mine,), (theirs,) = (
            bench.files(f"shards/*.{table}.arrow", spec) for spec in (SPEC, other)
        )
        replace_file(bench, mine, theirs.read_bytes(), table)
    with pytest.raises(FormatError):
        read_all(bench)


def test_a_shard_that_only_names_another_set_is_refused(bench) -> None:
    bench.filled(SAMPLES)
    (path,) = bench.files("shards/*.labels.arrow")
    with pa.ipc.open_file(str(path)) as file:
        batches = [file.get_batch(n) for n in range(file.num_record_batches)]
        metadata = {**file.schema.metadata, b"distillcache.label_set": b"f" * 32}
        schema = file.schema.with_metadata(metadata)
    forged = encode_file([batch.cast(schema) for batch in batches], schema)
    replace_file(bench, path, forged, "labels")
    with pytest.raises(WrongLabelSetError, match=f"belongs to label set .*{'f' * 32}"):
        read_all(bench)


def test_a_record_of_another_set_is_refused(bench) -> None:
    bench.filled(SAMPLES)
    bench.edit(record_of(bench), lambda document: document.update(label_set="f" * 32))
    with pytest.raises(WrongLabelSetError):
        read_all(bench)


@pytest.mark.parametrize("table", ["labels", "samples", "index"])
def test_a_file_of_another_kind_is_refused(bench, table: str) -> None:
    bench.filled(SAMPLES)
    pattern = "index/*" if table == "index" else f"shards/*.{table}.arrow"
    replace_file(bench, bench.files(pattern)[0], b"PAR1" * 500, table)
    with pytest.raises(WrongMagicError):
        read_all(bench)


@pytest.mark.parametrize("sign", [False, True])
def test_a_spec_edited_by_hand_is_refused(bench, sign: bool) -> None:
    bench.filled(SAMPLES)
    bench.edit(
        bench.folder() / "spec.json",
        lambda document: document["spec"]["kind"].update(k=9),
        sign=sign,
    )
    with pytest.raises(EditedSpecError):
        bench.fresh()


# -- records and indexes that lie ------------------------------------------------------------------
RECORDS: dict[str, Callable[[dict], object]] = {
    "batches of other lengths": lambda d: d["shards"][0].update(batch_rows=[5, 15]),
    "more batches than there are": lambda d: d["shards"][0].update(batch_rows=[1] * 20),
    "a batch without rows": lambda d: d["shards"][0].update(batch_rows=[0, 20]),
    "rows that are not the sum": lambda d: d["shards"][0].update(num_rows=21),
    "no first keys": lambda d: d["index"].update(first_keys=[]),
    "more first keys": lambda d: d["index"].update(first_keys=["0" * 32, "1" * 32]),
    "a first key that is none": lambda d: d["index"].update(first_keys=["xyz"]),
    "first keys in another order": lambda d: d["index"].update(first_keys=["1" * 32, "0" * 32]),
    "a shard less": lambda d: d.update(shards=[]),
    "a negative size": lambda d: d["shards"][0]["labels"].update(num_bytes=-1),
    "a number as text": lambda d: d.update(first="one"),
    "since zero": lambda d: d["shards"][0].update(since=0),
    "a partition of letters": lambda d: d["shards"][0].update(partition="ab"),
    "seventeen partition bits": lambda d: d.update(partition_bits=17),
    "another format": lambda d: d.update(format=2),
    "an unknown member": lambda d: d.update(extra=1),
    "no shards member": lambda d: d["shards"][0].pop("labels"),
}


@pytest.mark.parametrize("what", RECORDS)
def test_a_record_that_lies_is_refused(bench, what: str) -> None:
    bench.filled(SAMPLES)
    bench.edit(record_of(bench), RECORDS[what])
    with pytest.raises(LabelStoreError):
        read_all(bench)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 10**5, b'{"first": 1' + b"0" * 5000 + b"}"],
    ids=["empty", "null", "list", "object", "no text", "deep", "long"],
)
def test_a_record_that_is_none_is_refused(bench, content: bytes) -> None:
    bench.filled(SAMPLES)
    record_of(bench).write_bytes(content)
    with pytest.raises(FormatError, match=r"00000001\.json is not a CommitRecord"):
        read_all(bench)


def forge_index(bench, **columns: list[int]) -> None:
    """Other values in some columns of the index, for its four samples in key order."""
    bench.filled(SAMPLES)
    (path,) = bench.files("index/*")
    with pa.ipc.open_file(str(path)) as file:
        table = file.read_all().to_pydict()
    batch = pa.RecordBatch.from_pydict({**table, **columns}, schema=INDEX_SCHEMA)
    replace_file(bench, path, encode_file([batch], INDEX_SCHEMA), "index")


INDEXES: dict[str, dict[str, list[int]]] = {
    "a shard that does not exist": {"shard": [0, 0, 0, 1]},
    "a shard far away": {"shard": [2**31 - 1] * 4},
    "a negative shard": {"shard": [-2] * 4},
    "a row that does not exist": {"row": [0, 1, 2, 4]},
    "the row of another sample": {"row": [1, 0, 2, 3]},
    "a first row that does not exist": {"first_row": [0, 5, 10, 1000]},
    "a negative first row": {"first_row": [-1, 5, 10, 15]},
    "a negative row": {"row": [-1, 1, 2, 3]},
}


@pytest.mark.parametrize("what", INDEXES)
def test_an_index_that_lies_leads_to_no_wrong_sample(bench, what: str) -> None:
    """Either a reader refuses, or what it is told does not matter; verify finds it always."""
    forge_index(bench, **INDEXES[what])
    try:
        found = read_all(bench)
    except LabelStoreError:
        found = []
    for sample, expected in zip(found, SAMPLES, strict=False):
        bench.assert_same(sample, expected)
    assert "index" in {problem.what for problem in bench.fresh().verify()}


def test_an_index_of_unsorted_keys_is_found_by_verify_or_served_right(bench) -> None:
    """Bisection may miss keys of an unsorted index; it must not find wrong ones."""
    bench.filled(SAMPLES)
    (path,) = bench.files("index/*")
    with pa.ipc.open_file(str(path)) as file:
        table = file.read_all()
    backwards = table.take([3, 2, 1, 0]).to_batches()[0].cast(INDEX_SCHEMA)
    replace_file(bench, path, encode_file([backwards], INDEX_SCHEMA), "index")
    label_set: LabelSet = bench.fresh()
    there = label_set.contains(KEYS).tolist()
    served = [key for key, found in zip(KEYS, there, strict=True) if found]
    assert [sample.key for sample in label_set.read(served)] == served
