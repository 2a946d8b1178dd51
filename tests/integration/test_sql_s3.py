"""SQL over a bucket: the same answers as from the samples, while labelling goes on."""

import pytest

from storage.errors import ShardCorruptError
from storage.objects import Objects
from storage.sql import open_database
from storage.sql.snapshot import PARALLEL_SHARDS
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

pytestmark = pytest.mark.integration

SPEC = make_spec(k=4)
SAMPLES = [make_sample(number, SPEC) for number in range(2 * PARALLEL_SHARDS + 3)]


def test_a_bucket_is_asked_while_it_grows(bucket: str) -> None:
    store = LabelStore(f"s3://{bucket}/team/labels")
    label_set = store.create(SPEC, {})
    for sample in SAMPLES:  # a shard each, more than are opened ahead
        label_set.append([sample], {})
    with open_database(store) as database:
        label_set.append([make_sample(100, SPEC)], {})
        rows = database.query(
            "select sample_key, count(*), sum(entropy) from labels group by 1 order by 1"
        ).table()
        first = next(database.query("select rank, logprob from topk").batches)
        assert first.num_rows > 0  # the rest is never read
    assert [
        (key, count) for key, count, _ in zip(*rows.to_pydict().values(), strict=True)
    ] == sorted((sample.key, 5) for sample in SAMPLES)
    expected = sum(float(value) for sample in SAMPLES for value in sample.entropy_N)
    assert sum(rows.to_pydict()["sum(entropy)"]) == pytest.approx(expected)
    with open_database(store) as database:
        (count,) = database.query("select count(*) from samples").table()[0].to_pylist()
        assert count == len(SAMPLES) + 1


def test_a_damaged_object_ends_the_query(bucket: str) -> None:
    uri = f"s3://{bucket}/team/labels"
    store = LabelStore(uri)
    label_set = store.create(SPEC, {})
    label_set.append(SAMPLES[:3], {})
    (path,) = label_set.files("labels")
    objects = Objects(uri)
    data = bytearray(objects.get(path))
    data[len(data) // 2] ^= 1
    objects.delete(path)
    objects.create(path, bytes(data))
    with open_database(store) as database, pytest.raises(ShardCorruptError):
        database.query("select * from topk, labels").table()
