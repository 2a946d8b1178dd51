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

import re
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator

import numpy as np
import obstore
import pytest
from obstore.store import from_url

from storage.errors import LabelStoreError, ShardCorruptError
from storage.objects import Objects
from storage.selection import SampleRequest, Selection, Source, load_selection
from storage.store import LabelSet, LabelStore
from storage.testing import make_sample, make_spec

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC) for number in range(8)]
KEYS = [sample.key for sample in SAMPLES]


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of an S3 server; the OS chooses the port."""
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    seen = []
    for line in server.stderr:
        seen.append(line)
        if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", line):
            break
    else:
        pytest.fail(f"moto did not start: {''.join(seen)}")
    yield found[1]
    server.kill()
    server.communicate()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket, and the environment that makes ``s3://`` mean the test server."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"labels-{uuid.uuid4().hex[:8]}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(urllib.request.Request(f"{s3_endpoint}/{name}", method="PUT"), timeout=30).close()
    return name


def new_set(bucket: str) -> LabelSet:
    return LabelStore(f"s3://{bucket}/team/labels").create(SPEC, {})


def shard_path(labels: LabelSet) -> str:
    record = labels.refresh()[0]
    return f"team/labels/{labels.prefix}/shards/{record.shards[0].labels.name}"


def test_samples_read_as_they_were_appended(bucket: str) -> None:
    new_set(bucket).append(SAMPLES, {})
    store = LabelStore(f"s3://{bucket}/team/labels")
    assert store.keys() == [SPEC.key]
    labels = store.open(SPEC.key[:8])
    for found, expected in zip(labels.read(KEYS), SAMPLES, strict=True):
        assert found.key == expected.key
        np.testing.assert_array_equal(found.response_ids_R, expected.response_ids_R)
        np.testing.assert_array_equal(found.topk_ids_NK, expected.topk_ids_NK)
        assert np.abs(found.topk_logprobs_NK - expected.topk_logprobs_NK).max() <= 1 / 512
    assert list(labels.verify()) == []


def test_the_prefix_of_the_uri_holds_the_store(bucket: str) -> None:
    labels = new_set(bucket)
    found = obstore.get(from_url(f"s3://{bucket}"), f"team/labels/{labels.prefix}/spec.json")
    assert SPEC.key.encode() in bytes(found.bytes())


def test_an_object_is_created_once_and_never_replaced(bucket: str) -> None:
    objects = Objects(f"s3://{bucket}/team")
    assert objects.create("a/00000001.json", b"first") is True
    assert objects.create("a/00000001.json", b"second") is False
    assert objects.get("a/00000001.json") == b"first"


def test_two_writers_share_one_history(bucket: str) -> None:
    one, other = new_set(bucket), new_set(bucket)
    one.append(SAMPLES[:5], {})
    record = other.append(SAMPLES[3:], {})
    assert record is not None
    assert (record.number, record.shards[0].num_samples) == (2, 3)  # samples 5, 6, 7
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
    ours = LabelSet(RacedObjects(f"s3://{bucket}/team/labels"), other.document)
    record = ours.append(SAMPLES[3:], {})
    assert record is not None
    assert (record.number, record.shards[0].num_samples) == (2, 3)  # samples 5, 6, 7
    assert list(other.verify()) == []
    assert other.totals().num_samples == 8


def test_a_damaged_shard_is_refused_and_found_by_verify(bucket: str) -> None:
    labels = new_set(bucket)
    labels.append(SAMPLES, {})
    plain, path = from_url(f"s3://{bucket}"), shard_path(labels)
    damaged = bytearray(obstore.get(plain, path).bytes())
    damaged[len(damaged) // 2] ^= 1
    obstore.put(plain, path, bytes(damaged))
    with pytest.raises(ShardCorruptError, match=rf"s3://{bucket}/team/labels/.*has the checksum"):
        list(labels.read(KEYS))
    assert [problem.lost_samples for problem in labels.verify()] == [8]


def test_a_deleted_shard_is_refused(bucket: str) -> None:
    labels = new_set(bucket)
    labels.append(SAMPLES, {})
    obstore.delete(from_url(f"s3://{bucket}"), shard_path(labels))
    with pytest.raises(ShardCorruptError, match="was committed and is missing"):
        list(labels.read(KEYS))


def test_a_selection_is_stored_beside_the_labels(bucket: str) -> None:
    objects = Objects(f"s3://{bucket}/team/labels")
    requests = tuple(
        SampleRequest(s.key, 0, s.prompt_ids_P, None, (Source("train.jsonl", 1, "a"),))
        for s in SAMPLES
    )
    key = Selection(requests).save(objects)
    assert load_selection(objects, key).sample_keys == KEYS


def test_a_missing_bucket_is_an_error_and_not_an_empty_store(bucket: str) -> None:
    with pytest.raises(LabelStoreError, match="cannot list s3://no-such-bucket/labels"):
        LabelStore("s3://no-such-bucket/labels").keys()


def test_a_large_object_is_created_once_too(bucket: str) -> None:
    """Above a few MB obstore would upload in parts, which knows no put-if-absent."""
    objects = Objects(f"s3://{bucket}/team")
    first = bytes(12 * 2**20)
    assert objects.create("large", first) is True
    assert objects.create("large", b"\1" + first) is False
    assert objects.get("large") == first
