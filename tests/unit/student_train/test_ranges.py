"""A batch made of ranges of decoded batches is that of the samples themselves, bit by bit."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from storage.keys import CountsSpec, LabelSetSpec, MassSpec, TopKSpec
from storage.samples import LabelledSample
from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train.config import LabelSource, TrainDataConfig
from student_train.streaming.reader import LabelReader, MicroBatch, collate

SPECS = {
    "fixed k": make_spec(vocab_size=40),
    "adaptive k": make_spec(vocab_size=40, kind=MassSpec(mass=0.8, cap=12)),
    "columns": make_spec(
        vocab_size=40, columns=("entropy", "power_sum_200", "power_sums", CountsSpec(draws=9))
    ),
}


def write(directory: Path, spec: LabelSetSpec, *, first: int, longest: int) -> LabelSource:
    store = LabelStore(str(directory), create=True)
    label_set = store.create(spec, {})
    samples = [
        make_sample(number, spec, num_tokens=1 + number * 7 % longest)
        for number in range(first, first + 30)
    ]
    for start in range(0, 30, 10):
        label_set.append(samples[start : start + 10], {})
    requests = tuple(SampleRequest(s.key, 0, s.prompt_ids_P, None, ()) for s in samples)
    return LabelSource(
        store=store.uri,
        label_set=label_set.key,
        selection=Selection(requests).save(store.objects),
    )


def assert_same(found: MicroBatch, expected: MicroBatch) -> None:
    assert found.document_ends == expected.document_ends
    for name in ("input_ids_BT", "attention_mask_BT", "rows_M"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for field in fields(expected.labels):
        one, other = getattr(found.labels, field.name), getattr(expected.labels, field.name)
        pairs = {"": (one, other)}
        if isinstance(other, dict):
            assert one.keys() == other.keys()
            pairs = {key: (one[key], other[key]) for key in other}
        for mine, theirs in pairs.values():
            if isinstance(theirs, torch.Tensor):
                assert mine.dtype == theirs.dtype, field.name
                assert torch.equal(mine, theirs), field.name
            else:
                assert mine == theirs, field.name


def by_hand(samples: list[LabelledSample], *, packed: bool) -> list[list[int]]:
    """Token rows of the obvious kind."""
    rows = [[*s.prompt_ids_P.tolist(), *s.response_ids_R[:-1].tolist()] for s in samples]
    if packed:
        return [[token for row in rows for token in row]]
    width = max(map(len, rows))
    return [row + [0] * (width - len(row)) for row in rows]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("longest", [5, 80], ids=["short", "long"])
@pytest.mark.parametrize("kind", SPECS)
def test_batches_of_one_label_set(kind: str, longest: int, packed: bool, tmp_path: Path) -> None:
    source = write(tmp_path, SPECS[kind], first=0, longest=longest)
    reader, random = LabelReader(source), np.random.default_rng(0)
    for hard in ("sampled", "argmax", "random"):
        indices = random.permutation(30)[:12].tolist()
        samples = reader.read(indices)
        found = collate(reader.ranges(indices), hard, reader.spec, packed=packed)
        assert_same(found, collate(samples, hard, reader.spec, packed=packed))
        assert found.input_ids_BT.tolist() == by_hand(samples, packed=packed)
        topk = np.concatenate([sample.topk_logprobs_NK for sample in samples])
        assert found.labels.topk_logprobs_MK.tolist() == topk.tolist()


def test_batches_of_a_mixture_with_fewer_tokens_per_position(tmp_path: Path) -> None:
    one = write(tmp_path / "one", SPECS["columns"], first=0, longest=9)
    spec = make_spec(kind=TopKSpec(k=5), vocab_size=40, seed=3)
    other = write(tmp_path / "other", spec, first=40, longest=30)
    reader = LabelReader(one, mixture=[other], data=TrainDataConfig(k=3))
    indices = np.random.default_rng(1).permutation(60)[:25].tolist()
    found = collate(reader.ranges(indices), "sampled", reader.spec, packed=True)
    assert found.labels.topk_ids_MK.shape[1] == 3
    assert_same(found, collate(reader.read(indices), "sampled", reader.spec, packed=True))
