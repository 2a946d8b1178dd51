"""Batches come in the order of the plan, whatever reads them, from any step on, or not at all."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from storage.errors import ShardCorruptError
from storage.label_batch import SampleRanges
from storage.samples import LabelledSample
from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train.config import BatchConfig, LabelSource, LoaderConfig, TrainConfig
from student_train.streaming.reader import LabelReader, MicroBatch, collate
from student_train.streaming.step_plan import TrainingPlan
from student_train.streaming.stream import BatchStream
from student_train.trainer import plan_training

SPEC = make_spec(vocab_size=40)
TRAIN = TrainConfig(
    model="",
    epochs=2,
    seed=5,
    batch=BatchConfig(tokens=120, micro_tokens=60, row_tokens=30, lanes=8, window_tokens=60),
)
NUM_SAMPLES = 60
LENGTHS = [4 + n % 3 + 2 + n % 13 for n in range(NUM_SAMPLES)]
"""Tokens of every sample, prompt and response."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> LabelSource:
    """Samples in three commits, so in three shards."""
    store = LabelStore(str(tmp_path_factory.mktemp("store")), create=True)
    samples = [make_sample(n, SPEC, num_tokens=2 + n % 13) for n in range(NUM_SAMPLES)]
    label_set = store.create(SPEC, {})
    for start in range(0, NUM_SAMPLES, 20):
        label_set.append(samples[start : start + 20], {})
    requests = tuple(
        SampleRequest(s.key, s.sample_index, s.prompt_ids_P, None, ()) for s in samples
    )
    selection = Selection(requests).save(store.objects)
    return LabelSource(store=store.uri, label_set=label_set.key, selection=selection)


def open_stream(
    reader: LabelReader, *, rank: int = 0, world_size: int = 1, first_step: int = 0, **loader: int
) -> tuple[BatchStream, TrainingPlan]:
    plan = plan_training(reader, TRAIN)
    stream = BatchStream(
        reader,
        plan,
        first_step=first_step,
        rank_of_world=(rank, world_size),
        collate=partial(collate, hard="sampled", spec=reader.spec, packed=True),
        loader=LoaderConfig.model_validate(loader),
    )
    return stream, plan


def drain(stream: BatchStream) -> Iterator[MicroBatch]:
    with stream:
        while True:
            try:
                yield stream.next()
            except StopIteration:
                return


def fingerprints(batches: Sequence[MicroBatch]) -> list[object]:
    return [
        (
            batch.counts,
            batch.input_ids_BT.tolist(),
            batch.document_ends,
            batch.rows_M.tolist(),
            batch.labels.topk_logprobs_MK.tolist(),
        )
        for batch in batches
    ]


@pytest.fixture(scope="module")
def expected(source: LabelSource) -> list[object]:
    return fingerprints(list(drain(open_stream(LabelReader(source))[0])))


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("prefetch", [1, 7])
def test_any_number_of_workers_gives_the_same_batches(
    workers: int, prefetch: int, source: LabelSource, expected: list[object]
) -> None:
    stream, _ = open_stream(LabelReader(source), workers=workers, prefetch=prefetch)
    assert fingerprints(list(drain(stream))) == expected


def test_every_sample_of_an_epoch_is_streamed_once(source: LabelSource) -> None:
    reader = LabelReader(source)
    stream, plan = open_stream(reader)
    documents: dict[int, int] = {}
    for step in range(len(plan)):
        for _ in plan.rounds(step, 0, 1):
            batch = stream.next()
            documents[step] = documents.get(step, 0) + len(batch.document_ends or ())
    stream.close()
    assert [documents[step] for step in range(len(plan))] == [
        len(plan.step(step).samples) for step in range(len(plan))
    ]
    assert sum(documents.values()) == TRAIN.epochs * NUM_SAMPLES


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_together_stream_the_labels_of_every_step(
    world_size: int, source: LabelSource
) -> None:
    """Label rows of a step, summed over ranks: the global batch does not depend on their number."""
    plan = plan_training(LabelReader(source), TRAIN)
    streams = [
        open_stream(LabelReader(source), rank=rank, world_size=world_size)[0]
        for rank in range(world_size)
    ]
    alone = open_stream(LabelReader(source))[0]
    for step in range(len(plan)):
        found = [
            stream.next()
            for rank, stream in enumerate(streams)
            for _ in plan.rounds(step, rank, world_size)
        ]
        wanted = [alone.next() for _ in plan.rounds(step, 0, 1)]
        assert label_rows(found) == label_rows(wanted)
    for stream in [*streams, alone]:
        stream.close()


def label_rows(batches: Sequence[MicroBatch]) -> list[tuple[float, ...]]:
    return sorted(
        tuple(row)
        for batch in batches
        if batch.counts
        for row in batch.labels.topk_logprobs_MK.tolist()
    )


@pytest.mark.parametrize("first_step", [1, 5, 9])
def test_a_stream_that_begins_at_a_step_gives_the_rest(
    first_step: int, source: LabelSource, expected: list[object]
) -> None:
    """Resuming in the middle of an epoch: the number of the step is the whole position."""
    stream, plan = open_stream(LabelReader(source), first_step=first_step)
    skipped = sum(len(plan.rounds(step, 0, 1)) for step in range(first_step))
    assert fingerprints(list(drain(stream))) == expected[skipped:]


def test_compaction_and_new_labels_do_not_disturb_a_run(
    tmp_path: Path, samples: list[LabelledSample]
) -> None:
    from storage.compact import compact

    store = LabelStore(str(tmp_path), create=True)
    label_set = store.create(SPEC, {})
    for sample in samples:
        label_set.append([sample], {})
    requests = tuple(SampleRequest(s.key, 0, s.prompt_ids_P, None, ()) for s in samples)
    selection = Selection(requests).save(store.objects)
    source = LabelSource(store=store.uri, label_set=label_set.key, selection=selection)
    before = fingerprints(list(drain(open_stream(LabelReader(source))[0])))
    stream, _ = open_stream(LabelReader(source), prefetch=1)
    first = stream.next()
    compact(label_set, {})
    label_set.append([make_sample(77, SPEC)], {})
    assert fingerprints([first, *drain(stream)]) == before
    assert fingerprints(list(drain(open_stream(LabelReader(source))[0]))) == before


def test_no_more_is_read_than_is_made_ahead(
    source: LabelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded by ``prefetch``, not by the epoch."""
    reader = LabelReader(source)
    read: list[int] = []
    original = reader.ranges

    def counted(indices: Sequence[int]) -> SampleRanges:
        read.extend(indices)
        return original(indices)

    monkeypatch.setattr(reader, "ranges", counted)
    stream, plan = open_stream(reader, prefetch=2)
    most = max(
        sum(len(samples) for _, samples in group or ())
        for step in range(len(plan))
        for group in plan.rounds(step, 0, 1)
    )
    number = 0
    for number, _ in enumerate(drain(stream), start=1):
        # taken, ready (2), offered (1), asked for (2) and one more that is being asked for
        assert len(read) <= (number + 6) * most
    assert number > 10
    assert len(read) == TRAIN.epochs * NUM_SAMPLES


def test_a_damaged_shard_ends_the_stream_with_its_name_and_what_is_lost(
    tmp_path: Path, samples: list[LabelledSample]
) -> None:
    store = LabelStore(str(tmp_path), create=True)
    label_set = store.create(SPEC, {})
    label_set.append(samples, {})
    requests = tuple(SampleRequest(s.key, 0, s.prompt_ids_P, None, ()) for s in samples)
    selection = Selection(requests).save(store.objects)
    reader = LabelReader(LabelSource(store=store.uri, label_set=label_set.key, selection=selection))
    (path,) = label_set.files("labels")
    file = tmp_path / path
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    file.write_bytes(bytes(damaged))
    stream, plan = open_stream(reader)
    name = Path(path).name.split(".")[0]
    with pytest.raises(ShardCorruptError) as caught:
        list(drain(stream))
    message = str(caught.value)
    assert name in message
    assert "batch 0" in message
    assert "6 samples" in message
    assert "distill repair" in message
    assert f"needed for step 1 of {len(plan)}" in message
    assert "last checkpoint" in message


def test_a_stream_that_is_left_early_ends_its_threads(source: LabelSource) -> None:
    import threading

    before = threading.active_count()
    with open_stream(LabelReader(source), workers=3, prefetch=1)[0] as stream:
        assert isinstance(stream.next(), MicroBatch)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_the_time_spent_waiting_is_counted(source: LabelSource) -> None:
    stream, _ = open_stream(LabelReader(source))
    assert stream.waited_s == 0
    stream.next()
    waited = stream.waited_s
    assert waited > 0  # the first batch is never ready
    list(drain(stream))
    assert stream.waited_s > waited


def test_batches_are_those_of_the_samples_themselves(source: LabelSource) -> None:
    """Through threads or not: what arrives is what the cache holds."""
    reader = LabelReader(source)
    stream, plan = open_stream(LabelReader(source))
    for group in plan.rounds(0, 0, 1):
        assert group is not None
        wanted = reader.read([sample for _, samples in group for sample in samples])
        found, by_hand = stream.next(), collate(wanted, "sampled", SPEC, packed=True)
        assert torch.equal(found.input_ids_BT, by_hand.input_ids_BT)
        assert torch.equal(found.labels.topk_ids_MK, by_hand.labels.topk_ids_MK)
    stream.close()


def test_a_rank_without_a_batch_computes_a_real_one_that_does_not_count(
    source: LabelSource,
) -> None:
    """Of the same step, and the shortest: ranks must make their gradients in the same order."""
    world_size, idle = 8, 0
    for rank in range(world_size):
        stream, plan = open_stream(LabelReader(source), rank=rank, world_size=world_size)
        for step in range(len(plan)):
            shortest = min(plan.step(step).samples, key=lambda s: int(LENGTHS[s]))
            for group in plan.rounds(step, rank, world_size):
                batch = stream.next()
                assert batch.counts == (group is not None)
                if group is None:
                    idle += 1
                    assert batch.input_ids_BT.shape == (1, LENGTHS[shortest] - 1)
        stream.close()
    assert idle > 0
