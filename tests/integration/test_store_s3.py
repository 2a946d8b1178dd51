"""The label cache on S3: the same behaviour as on a local disk, against a real server.

The server is moto in a process of its own (inside ours, pyarrow's and its threads would wait for
each other). It checks what the store relies on, conditional puts above all; it proves nothing about
the durability of a real provider.

obstore reads its settings from the environment; these are the ones that matter:

* ``AWS_ENDPOINT_URL``: address of an S3-compatible server; unset for AWS itself
* ``AWS_ALLOW_HTTP``: ``true`` to allow an endpoint without TLS
* ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``: credentials, unless the
  machine has a role
* ``AWS_REGION``
* ``AWS_CONDITIONAL_PUT``: left alone; its default, ``etag``, sends ``If-None-Match: *``, which is
  how commit records are created
"""

import datetime
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import obstore
import pytest
from obstore.store import from_url

from storage.compact import compact
from storage.errors import LabelStoreError, ShardCorruptError
from storage.garbage import collect, drop, find_garbage
from storage.keys import LabelSetSpec, TopKSpec
from storage.label_set import LabelSet
from storage.objects import Objects
from storage.pack import pack, unpack
from storage.provenance import provenance
from storage.repair import repair
from storage.selection import SampleRequest, Selection, Source, load_selection
from storage.sidecar import SidecarSpec, list_sidecars
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from tests.integration import store_faults as faults
from tests.integration.conftest import ACCESS_KEY, SECRET_KEY, Network

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC) for number in range(8)]
KEYS = [sample.key for sample in SAMPLES]
AT_ONCE = datetime.timedelta(0)


def uri_of(bucket: str) -> str:
    return f"s3://{bucket}/team/labels"


def new_set(bucket: str, spec: LabelSetSpec = SPEC) -> LabelSet:
    return LabelStore(uri_of(bucket)).create(spec, {})


def reopened(bucket: str) -> LabelSet:
    return LabelStore(uri_of(bucket)).open(SPEC.key)


def assert_serves(bucket: str, samples: list[faults.LabelledSample] = SAMPLES) -> None:
    labels = reopened(bucket)
    keys = [sample.key for sample in samples]
    for found, expected in zip(labels.read(keys), samples, strict=True):
        faults.assert_same(found, expected)
    assert labels.totals().num_samples == len(samples)
    assert list(labels.verify()) == []


def shard_path(labels: LabelSet) -> str:
    """Of a labels file, below the bucket."""
    return f"team/labels/{labels.files()[0]}"


def damage(bucket: str, path: str) -> None:
    plain = from_url(f"s3://{bucket}")
    damaged = bytearray(obstore.get(plain, path).bytes())
    damaged[len(damaged) // 2] ^= 1
    obstore.put(plain, path, bytes(damaged))


def everything(bucket: str) -> Iterator[bytes]:
    plain = from_url(f"s3://{bucket}")
    for batch in obstore.list(plain):
        for meta in batch:
            yield meta["path"].encode()
            yield bytes(obstore.get(plain, meta["path"]).bytes())


# -- the medium -----------------------------------------------------------------------------------
def test_the_prefix_of_the_uri_holds_the_store(bucket: str) -> None:
    labels = new_set(bucket)
    found = obstore.get(from_url(f"s3://{bucket}"), f"team/labels/{labels.prefix}/spec.json")
    assert SPEC.key.encode() in bytes(found.bytes())


def test_an_object_is_created_once_and_never_replaced(bucket: str) -> None:
    objects = Objects(f"s3://{bucket}/team")
    assert objects.create("a/00000001.json", b"first") is True
    assert objects.create("a/00000001.json", b"second") is False
    assert objects.get("a/00000001.json") == b"first"


def test_a_large_object_is_created_once_too(bucket: str) -> None:
    """Above a few MB obstore would upload in parts, which knows no put-if-absent."""
    objects = Objects(f"s3://{bucket}/team")
    first = bytes(12 * 2**20)
    assert objects.create("large", first) is True
    assert objects.create("large", b"\1" + first) is False
    assert objects.get("large") == first


def test_a_missing_bucket_is_an_error_and_not_an_empty_store(bucket: str) -> None:
    with pytest.raises(LabelStoreError, match="cannot list s3://no-such-bucket/labels"):
        LabelStore("s3://no-such-bucket/labels").keys()


# -- appending and reading ------------------------------------------------------------------------
def test_samples_read_as_they_were_appended(bucket: str) -> None:
    new_set(bucket).append(SAMPLES, {})
    store = LabelStore(uri_of(bucket))
    assert store.keys() == [SPEC.key]
    assert store.open(SPEC.key[:8]).key == SPEC.key
    assert_serves(bucket)


def test_two_writers_share_one_history(bucket: str) -> None:
    one, other = new_set(bucket), new_set(bucket)
    one.append(SAMPLES[:5], {})
    record = other.append(SAMPLES[3:], {})
    assert record is not None
    assert (record.first, record.num_samples) == (2, 3)  # samples 5, 6, 7
    assert one.missing(KEYS) == []


def test_a_lost_race_for_a_commit_number_is_run_again(bucket: str) -> None:
    class RacedObjects(Objects):
        """The other writer commits just before our first commit record is created."""

        raced = False

        def create(self, path: str, data: bytes) -> bool:
            if "/commits/" in path and not self.raced:
                self.raced = True
                other.append(SAMPLES[:5], {})
            return super().create(path, data)

    other = new_set(bucket)
    record = LabelSet(RacedObjects(uri_of(bucket)), other.document).append(SAMPLES[3:], {})
    assert record is not None
    assert (record.first, record.num_samples) == (2, 3)  # samples 5, 6, 7
    assert_serves(bucket)


def test_two_writing_processes_at_once_store_every_sample_once(bucket: str) -> None:
    uri, total = uri_of(bucket), range(12)
    work = [[[number] for number in total], [[number, 11 - number] for number in total]]
    children = [faults.started_writer(uri, commits) for commits in work]
    for child in children:
        child.connection.send("go")
    for child, commits in zip(children, work, strict=True):
        assert child.messages() == commits
    assert faults.assert_intact(uri, total, total) == set(total)


def test_a_history_is_merged_and_read_in_few_records(bucket: str) -> None:
    labels = new_set(bucket)
    samples = [faults.sample(number) for number in range(17)]
    for sample in samples:
        labels.append([sample], {})
    assert [(r.first, r.last) for r in reopened(bucket).log.walk(1)] == [(1, 16), (17, 17)]
    assert_serves(bucket, samples)


# -- planning and views ---------------------------------------------------------------------------
def test_a_plan_tells_hits_upgrades_and_misses_apart(bucket: str) -> None:
    new_set(bucket).append(SAMPLES[:4], {})
    wide = SPEC.model_copy(update={"kind": TopKSpec(k=16)})
    new_set(bucket, wide).append([make_sample(6, wide)], {})
    plan = LabelStore(uri_of(bucket)).plan(wide, KEYS)
    assert np.flatnonzero(plan.hits).tolist() == [6]
    assert np.flatnonzero(plan.upgrades).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(plan.misses).tolist() == [4, 5, 7]


def test_a_view_reads_from_every_set_that_has_enough(bucket: str) -> None:
    new_set(bucket).append(SAMPLES[:4], {})
    wide = SPEC.model_copy(update={"kind": TopKSpec(k=16)})
    new_set(bucket, wide).append([make_sample(6, wide)], {})
    view = LabelStore(uri_of(bucket)).view(SPEC)
    found = list(view.read([KEYS[6], KEYS[1]]))
    assert [sample.key for sample in found] == [KEYS[6], KEYS[1]]
    np.testing.assert_array_equal(found[0].topk_ids_NK, SAMPLES[6].topk_ids_NK)
    faults.assert_same(found[1], SAMPLES[1])


def test_a_selection_is_stored_beside_the_labels(bucket: str) -> None:
    objects = Objects(uri_of(bucket))
    requests = tuple(
        SampleRequest(s.key, 0, s.prompt_ids_P, None, (Source("train.jsonl", 1, "a"),))
        for s in SAMPLES
    )
    key = Selection(requests).save(objects)
    assert load_selection(objects, key).sample_keys == KEYS


def test_sidecars_are_written_listed_and_read(bucket: str) -> None:
    labels = new_set(bucket)
    labels.append(SAMPLES, {})
    spec = SidecarSpec(producer={"student": "s", "estimator": "kl"}, columns=("kl",))
    values = {s.key: {"kl": np.arange(5, dtype=np.float32) + n} for n, s in enumerate(SAMPLES)}
    first = {key: values[key] for key in KEYS[:5]}
    assert labels.sidecar(spec).append(first) == 1
    assert labels.sidecar(spec).append(values) == 2
    again = reopened(bucket)
    assert list_sidecars(again) == [spec]
    for key, found in zip(KEYS, again.sidecar(spec).read(KEYS), strict=True):
        np.testing.assert_array_equal(found["kl"], values[key]["kl"])
    assert again.sidecar(spec).to_arrow().num_rows == 40


# -- what goes over the network -------------------------------------------------------------------
def test_a_few_columns_of_a_large_shard_are_fetched_alone(bucket: str, network: Network) -> None:
    spec = make_spec(k=64, vocab_size=20_000)
    random = np.random.default_rng(0)
    labels = new_set(bucket, spec)
    labels.append([large_sample(spec, random) for _ in range(100)], {})
    num_bytes = labels.totals().num_bytes
    assert num_bytes > 8 * 2**20  # smaller ones are fetched whole
    store = LabelStore(uri_of(bucket))
    network.bytes_received = network.requests = 0
    table = store.open(spec.key).to_arrow(["entropy"])
    assert table.num_rows == labels.totals().num_rows
    assert network.bytes_received < 0.25 * num_bytes
    assert network.requests < 100  # three for each of its 25 batches, and the histories


def large_sample(spec: LabelSetSpec, random: np.random.Generator) -> faults.LabelledSample:
    """A response of 2048 tokens whose labels hardly compress: one label again and again, but with
    other ids."""
    base, num_rows = make_sample(int(random.integers(2**31)), spec, num_tokens=1), 2048
    token, width = spec.vocab_size - 1, spec.kind.width
    ids_NK = np.cumsum(random.integers(1, token // width, size=(num_rows, width)), axis=1)
    if base.token_rank_N[0] <= width:
        ids_NK[:, base.token_rank_N[0] - 1] = token
    rows = {
        name: np.repeat(getattr(base, name), num_rows, axis=0)
        for name in faults.LabelledSample.__dataclass_fields__
        if name.endswith(("_N", "_NK"))
    }
    rows["positions_N"] = np.arange(num_rows, dtype=np.int32)
    rows["topk_ids_NK"] = ids_NK.astype(np.int32)
    rows["optional"] = {n: np.repeat(v, num_rows, axis=0) for n, v in base.optional.items()}
    return replace(base, response_ids_R=np.full(num_rows, token, dtype=np.int32), **rows)


def test_planning_opens_no_shard(bucket: str, network: Network) -> None:
    new_set(bucket).append(SAMPLES, {})
    for path in reopened(bucket).files("labels") + reopened(bucket).files("samples"):
        obstore.delete(from_url(f"s3://{bucket}"), f"team/labels/{path}")
    network.requests = 0
    assert LabelStore(uri_of(bucket)).plan(SPEC, KEYS).hits.all()
    assert network.requests < 16


# -- upkeep ---------------------------------------------------------------------------------------
def test_small_shards_are_compacted_and_the_old_ones_collected(bucket: str) -> None:
    labels = new_set(bucket)
    for sample in SAMPLES:
        labels.append([sample], {})
    reader = reopened(bucket).read(KEYS)
    faults.assert_same(next(reader), SAMPLES[0])
    assert compact(labels, {}).shards_after == 1
    kept = find_garbage(labels.objects, labels.key, datetime.timedelta(hours=24))
    assert kept.paths == {}
    found = find_garbage(labels.objects, labels.key, AT_ONCE)
    collect(labels.objects, found, {})
    assert len(found.paths) == 16
    for sample, expected in zip(reader, SAMPLES[1:], strict=True):
        faults.assert_same(sample, expected)
    assert_serves(bucket)


def test_a_dropped_set_is_gone_and_its_files_are_collected(bucket: str) -> None:
    labels = new_set(bucket)
    labels.append(SAMPLES, {})
    drop(labels, {})
    assert LabelStore(uri_of(bucket)).keys() == []
    collect(labels.objects, find_garbage(labels.objects, labels.key, AT_ONCE), {})
    assert list(labels.objects.paths(f"{labels.prefix}/shards")) == []
    new_set(bucket).append(SAMPLES[:2], {})
    assert_serves(bucket, SAMPLES[:2])


def test_a_damaged_shard_is_refused_repaired_and_labelled_again(bucket: str) -> None:
    labels = new_set(bucket)
    labels.append(SAMPLES[:3], {})
    damage(bucket, shard_path(labels))
    labels.append(SAMPLES[3:], {})
    with pytest.raises(ShardCorruptError, match=rf"s3://{bucket}/team/labels/label_sets/"):
        list(reopened(bucket).read(KEYS))
    problems = list(reopened(bucket).verify())
    assert [problem.lost_samples for problem in problems] == [3]
    assert repair(reopened(bucket), problems, {}).lost_samples == 3
    assert reopened(bucket).missing(KEYS) == KEYS[:3]
    reopened(bucket).append(SAMPLES, {})
    assert_serves(bucket)


def test_a_deleted_shard_is_refused(bucket: str) -> None:
    labels = new_set(bucket)
    labels.append(SAMPLES, {})
    obstore.delete(from_url(f"s3://{bucket}"), shard_path(labels))
    with pytest.raises(ShardCorruptError, match="it was committed: 8 samples are lost"):
        list(reopened(bucket).read(KEYS))


# -- archives -------------------------------------------------------------------------------------
def test_a_set_is_packed_to_and_unpacked_from_the_store(bucket: str, tmp_path: Path) -> None:
    labels = new_set(bucket)
    labels.append(SAMPLES[:4], {})
    labels.append(SAMPLES[4:], {})
    archive = f"s3://{bucket}/archives/labels.tar.zst"
    packed = pack(labels, archive, {})
    assert packed.num_samples == 8
    local = LabelStore(str(tmp_path), create=True)
    assert unpack(archive, local, {}).num_new == 8
    for found, expected in zip(local.open(SPEC.key).read(KEYS), SAMPLES, strict=True):
        faults.assert_same(found, expected)
    other = LabelStore(f"s3://{bucket}/other")
    other.create(SPEC, {}).append(SAMPLES[2:5], {})
    assert unpack(archive, other, {}).num_new == 5
    merged = other.open(SPEC.key)
    assert merged.missing(KEYS) == []
    assert list(merged.verify()) == []


def test_a_damaged_archive_changes_nothing(bucket: str) -> None:
    labels = new_set(bucket)
    labels.append(SAMPLES, {})
    pack(labels, f"s3://{bucket}/labels.tar.zst", {})
    damage(bucket, "labels.tar.zst")
    other = LabelStore(f"s3://{bucket}/other")
    with pytest.raises(LabelStoreError):
        unpack(f"s3://{bucket}/labels.tar.zst", other, {})
    assert other.keys() == []


# -- secrets --------------------------------------------------------------------------------------
def test_credentials_appear_in_no_object_error_or_log(
    bucket: str,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    caplog.set_level(logging.DEBUG)
    labels = new_set(bucket)
    labels.append(SAMPLES, provenance())
    labels.sidecar(SidecarSpec(producer={"student": "s"}, columns=("kl",))).append(
        {KEYS[0]: {"kl": np.zeros(5)}}
    )
    compact(labels, provenance())
    pack(labels, f"s3://{bucket}/labels.tar.zst", provenance())
    pack(labels, str(tmp_path / "labels.tar"), provenance())
    said = [*everything(bucket), (tmp_path / "labels.tar").read_bytes()]

    damage(bucket, shard_path(labels))
    for action in (
        lambda: list(reopened(bucket).read(KEYS)),
        lambda: LabelStore("s3://no-such-bucket/labels").keys(),
        lambda: LabelStore("s3://no-such-bucket/labels").create(SPEC, {}),
        lambda: unpack(f"s3://{bucket}/nothing.tar.zst", LabelStore(str(tmp_path)), {}),
    ):
        with pytest.raises((LabelStoreError, FileNotFoundError)) as error:
            action()
        said.append(every_word_of(error.value))
    monkeypatch.setattr("storage.objects.REMOTE_RETRY", {"max_retries": 0})
    network.cut()
    with pytest.raises(LabelStoreError) as error:
        reopened(bucket)
    said.append(every_word_of(error.value))
    printed = capfd.readouterr()
    said += [caplog.text.encode(), printed.out.encode(), printed.err.encode()]
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET_KEY
    for text in said:
        assert SECRET_KEY.encode() not in text
        assert ACCESS_KEY.encode() not in text


def every_word_of(error: BaseException) -> bytes:
    """Of an error and of all that it was raised from."""
    words = [str(error), repr(error)]
    if error.__cause__ is not None:
        words.append(every_word_of(error.__cause__).decode())
    return "\n".join(words).encode()
