"""Samples that were located once are those of the view, whatever happens to their shards."""

import datetime
from pathlib import Path

import numpy as np
import pytest

from storage.compact import compact
from storage.errors import NotLabelledError, ShardCorruptError
from storage.garbage import collect, find_garbage
from storage.index import parse_keys
from storage.keys import LabelSetSpec
from storage.located import LocatedSamples
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

SPEC = make_spec(k=8)
NARROW = make_spec(k=3)
SAMPLES = [make_sample(number, SPEC, num_tokens=1 + number % 5) for number in range(12)]
KEYS = [sample.key for sample in SAMPLES]
ORDER = [7, 0, 11, 3, 3, 5]


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    """Four commits of three samples."""
    store = LabelStore(str(tmp_path), create=True)
    label_set = store.create(SPEC, {})
    for start in range(0, 12, 3):
        label_set.append(SAMPLES[start : start + 3], {})
    return store


def texts(store: LabelStore, spec: LabelSetSpec) -> list[str]:
    return [repr(sample) for sample in store.view(spec).read([KEYS[place] for place in ORDER])]


@pytest.mark.parametrize("spec", [SPEC, NARROW], ids=["as stored", "fewer tokens"])
def test_they_are_the_samples_of_the_view(store: LabelStore, spec: LabelSetSpec) -> None:
    located = LocatedSamples(store.view(spec), parse_keys(KEYS))
    found = located.ranges(ORDER)
    assert [repr(sample) for sample in found.samples()] == texts(store, spec)
    assert located.num_rows_S.tolist() == [len(sample.positions_N) for sample in SAMPLES]
    assert located.num_tokens_S.tolist() == [len(sample.response_ids_R) for sample in SAMPLES]
    twin = located.fork(store.view(spec)).ranges(ORDER)
    assert [repr(sample) for sample in twin.samples()] == texts(store, spec)


def test_samples_that_compaction_moves_are_found_again(store: LabelStore) -> None:
    expected = texts(store, SPEC)
    located = LocatedSamples(store.view(SPEC), parse_keys(KEYS))
    located.ranges([0])
    writer = store.open(SPEC.key)
    compact(writer, {})
    garbage = find_garbage(writer.objects, writer.key, datetime.timedelta(seconds=-1))
    assert garbage.paths
    collect(writer.objects, garbage, {})
    assert [repr(sample) for sample in located.ranges(ORDER).samples()] == expected


def test_a_sample_that_is_not_stored_is_refused(store: LabelStore) -> None:
    missing = make_sample(99, SPEC).key
    with pytest.raises(NotLabelledError, match=f"1 of 13 samples .*{missing}"):
        LocatedSamples(store.view(SPEC), parse_keys([*KEYS, missing]))


def test_a_place_that_holds_another_sample_is_refused(store: LabelStore) -> None:
    located = LocatedSamples(store.view(SPEC), parse_keys(KEYS))
    np.copyto(located.keys[3], located.keys[4])
    with pytest.raises(ShardCorruptError, match=f"does not hold .*{KEYS[4]}.*distill repair"):
        located.ranges([3])
