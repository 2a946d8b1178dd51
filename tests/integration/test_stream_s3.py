"""Streaming from an object store, with and without copies of its shards on this machine."""

from functools import partial
from pathlib import Path

import pytest

from storage.errors import ShardCorruptError
from storage.objects import Objects
from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train.config import BatchConfig, LabelSource, LoaderConfig, TrainConfig
from student_train.streaming.reader import LabelReader, collate
from student_train.streaming.stream import BatchStream
from student_train.trainer import plan_training
from tests.integration.conftest import Network

SPEC = make_spec(vocab_size=40)
NUM_SAMPLES = 40
TRAIN = TrainConfig(
    model="", batch=BatchConfig(tokens=120, micro_tokens=60, row_tokens=30, lanes=4)
)


@pytest.fixture
def source(bucket: str) -> LabelSource:
    store = LabelStore(f"s3://{bucket}/labels")
    label_set = store.create(SPEC, {})
    samples = [make_sample(n, SPEC, num_tokens=2 + n % 9) for n in range(NUM_SAMPLES)]
    for start in range(0, NUM_SAMPLES, 10):
        label_set.append(samples[start : start + 10], {})
    requests = tuple(SampleRequest(s.key, 0, s.prompt_ids_P, None, ()) for s in samples)
    selection = Selection(requests).save(store.objects)
    return LabelSource(store=store.uri, label_set=label_set.key, selection=selection)


def stream_all(source: LabelSource, loader: LoaderConfig) -> list[list[int]]:
    reader = LabelReader(source, loader=loader)
    plan = plan_training(reader, TRAIN)
    stream = BatchStream(
        reader,
        plan,
        first_step=0,
        rank_of_world=(0, 1),
        collate=partial(collate, hard="sampled", spec=reader.spec, packed=True),
        loader=loader,
    )
    found = []
    with stream:
        for step in range(len(plan)):
            for _ in plan.rounds(step, 0, 1):
                found.append(stream.next().input_ids_BT.flatten().tolist())
    return found


def test_a_cached_stream_is_that_of_the_store_and_fetches_shards_once(
    source: LabelSource, network: Network, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    cached = LoaderConfig(workers=2, cache_directory=str(copies))
    expected = stream_all(source, LoaderConfig())
    assert sum(map(len, expected)) > 0
    before = network.bytes_received
    assert stream_all(source, cached) == expected
    first = network.bytes_received - before
    shard_bytes = sum(file.stat().st_size for file in copies.glob("*.arrow"))
    assert first > shard_bytes > 0
    before = network.bytes_received
    assert stream_all(source, cached) == expected
    # specs, commit records and the selection are read anew, shards and indexes are not
    assert network.bytes_received - before < first - shard_bytes / 2


def test_a_bounded_cache_stays_within_its_size(source: LabelSource, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    whole = LoaderConfig(cache_directory=str(copies))
    expected = stream_all(source, whole)
    sizes = [file.stat().st_size for file in copies.glob("*.arrow")]
    bound = max(sizes) * 2
    small = tmp_path / "small"
    assert (
        stream_all(source, LoaderConfig(cache_directory=str(small), cache_gib=bound / 2**30))
        == expected
    )
    assert sum(file.stat().st_size for file in small.glob("*.arrow")) <= bound


def test_a_damaged_remote_shard_is_refused_with_a_cache_too(
    source: LabelSource, tmp_path: Path
) -> None:
    objects = Objects(source.store)
    (path, *_) = LabelStore(source.store).open(source.label_set).files("labels")
    data = bytearray(objects.get(path))
    data[len(data) // 2] ^= 255
    file = tmp_path / "damaged"
    file.write_bytes(bytes(data))
    objects.upload(path, file)
    with pytest.raises(ShardCorruptError, match="distill repair"):
        stream_all(source, LoaderConfig(cache_directory=str(tmp_path / "copies")))
