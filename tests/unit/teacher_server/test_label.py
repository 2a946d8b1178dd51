"""The labelling loop: what is finished is committed in groups, whatever happens next."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from storage.keys import LabelSetSpec
from storage.label_set import LabelSet
from storage.quarantine import Quarantine
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.store import LabelStore
from teacher_server.backends.base import TeacherJob
from teacher_server.backends.fake import FakeBackend
from teacher_server.config import FakeBackendConfig
from teacher_server.label import LabelProgress, label_samples

MakeSpec = Callable[..., LabelSetSpec]
MakeRequest = Callable[..., SampleRequest]


class Failing(FakeBackend):
    """A teacher that raises, or lies, at one of its samples."""

    def __init__(self, job: TeacherJob, *, dies_at: int = -1, lies_at: int = -1) -> None:
        super().__init__(job)
        self._dies_at, self._lies_at = dies_at, lies_at

    def label(self, requests: Iterable[SampleRequest]) -> Iterator[LabelledSample]:
        for number, sample in enumerate(super().label(requests)):
            if number == self._dies_at:
                raise RuntimeError("the teacher died")
            if number == self._lies_at:
                sample = replace(sample, token_logprob_N=np.full(8, np.nan, np.float32))
            yield sample


@pytest.fixture
def spec(make_spec: MakeSpec) -> LabelSetSpec:
    return make_spec(max_tokens=8)


@pytest.fixture
def label_set(tmp_path: Path, spec: LabelSetSpec) -> LabelSet:
    return LabelStore(str(tmp_path), create=True).create(spec, {})


@pytest.fixture
def requests(make_request: MakeRequest) -> list[SampleRequest]:
    return [make_request([number, 7]) for number in range(7)]


def teacher(spec: LabelSetSpec, *, dies_at: int = -1, lies_at: int = -1) -> Failing:
    job = TeacherJob(model="none", backend=FakeBackendConfig(), spec=spec, max_model_len=64)
    return Failing(job, dies_at=dies_at, lies_at=lies_at)


def run(
    backend: FakeBackend,
    requests: list[SampleRequest],
    label_set: LabelSet,
    commit_samples: int = 3,
) -> Iterator[LabelProgress]:
    return label_samples(
        backend, requests, label_set, commit_samples=commit_samples, provenance={"host": "h"}
    )


def test_samples_are_committed_in_groups(
    spec: LabelSetSpec, label_set: LabelSet, requests: list[SampleRequest]
) -> None:
    list(run(teacher(spec), requests, label_set))
    sizes = [record.num_samples for record in label_set.log.singles()]
    assert sizes == [3, 3, 1]
    assert label_set.missing([r.key for r in requests]) == []


def test_progress_tells_what_is_finished_and_what_is_durable(
    spec: LabelSetSpec, label_set: LabelSet, requests: list[SampleRequest]
) -> None:
    seen = list(run(teacher(spec), requests, label_set))
    # seven samples, and once more for the last commit
    assert [p.finished_samples for p in seen] == [1, 2, 3, 4, 5, 6, 7, 7]
    assert [p.committed_samples for p in seen] == [0, 0, 3, 3, 3, 6, 6, 7]
    # responses of 8 tokens to prompts of 2
    assert [p.response_tokens for p in seen][-1] == 7 * 8
    assert [p.forward_tokens for p in seen][-1] == 7 * 10


def test_the_engine_is_recorded_with_every_commit(
    spec: LabelSetSpec, label_set: LabelSet, requests: list[SampleRequest]
) -> None:
    list(run(teacher(spec), requests[:1], label_set))
    (record,) = label_set.log.singles()
    assert record.provenance["host"] == "h"
    assert record.provenance["backend"] == "fake"


def test_what_was_committed_survives_a_teacher_that_dies(
    spec: LabelSetSpec, label_set: LabelSet, requests: list[SampleRequest]
) -> None:
    with pytest.raises(RuntimeError, match="the teacher died"):
        list(run(teacher(spec, dies_at=5), requests, label_set))
    # five were finished, a group of three of them committed
    assert label_set.missing([r.key for r in requests]) == [r.key for r in requests[3:]]


def test_the_next_run_labels_only_what_is_missing(
    spec: LabelSetSpec, label_set: LabelSet, requests: list[SampleRequest]
) -> None:
    with pytest.raises(RuntimeError, match="the teacher died"):
        list(run(teacher(spec, dies_at=5), requests, label_set))
    missing = set(label_set.missing([r.key for r in requests]))
    backend = teacher(spec)
    list(run(backend, [r for r in requests if r.key in missing], label_set))
    assert backend.forward_tokens == 4 * 10
    assert label_set.totals().num_samples == 7


def test_an_interrupted_run_ends_with_the_same_labels(
    tmp_path: Path, spec: LabelSetSpec, label_set: LabelSet, requests: list[SampleRequest]
) -> None:
    with pytest.raises(RuntimeError, match="the teacher died"):
        list(run(teacher(spec, dies_at=4), requests, label_set))
    missing = set(label_set.missing([r.key for r in requests]))
    list(run(teacher(spec), [r for r in requests if r.key in missing], label_set))
    whole = LabelStore(str(tmp_path / "other"), create=True).create(spec, {})
    list(run(teacher(spec), requests, whole))
    keys = [r.key for r in requests]
    for one, other in zip(label_set.read(keys), whole.read(keys), strict=True):
        np.testing.assert_array_equal(one.response_ids_R, other.response_ids_R)
        np.testing.assert_array_equal(one.topk_logprobs_NK, other.topk_logprobs_NK)


def test_a_bad_label_goes_to_quarantine_and_the_others_go_on(
    spec: LabelSetSpec, label_set: LabelSet, requests: list[SampleRequest]
) -> None:
    seen = list(run(teacher(spec, lies_at=4), requests, label_set))
    assert [p.bad_samples for p in seen] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (seen[-1].finished_samples, seen[-1].committed_samples) == (7, 6)
    (bad,) = Quarantine(label_set).samples()
    assert bad.sample == requests[4].key
    assert bad.reason == "bad label"
    assert "token_logprob is not finite" in bad.detail
    assert label_set.missing([r.key for r in requests]) == [requests[4].key]


def test_whoever_stops_finishes_and_commits_what_was_begun(
    spec: LabelSetSpec, label_set: LabelSet, requests: list[SampleRequest]
) -> None:
    asked = []

    def should_stop() -> bool:
        asked.append(None)
        return len(asked) > 5

    seen = list(
        label_samples(
            teacher(spec),
            requests,
            label_set,
            commit_samples=3,
            provenance={},
            should_stop=should_stop,
        )
    )
    assert seen[-1].committed_samples == 5
    assert label_set.missing([r.key for r in requests]) == [r.key for r in requests[5:]]


def test_samples_that_another_worker_committed_are_not_stored_twice(
    spec: LabelSetSpec, label_set: LabelSet, requests: list[SampleRequest]
) -> None:
    list(run(teacher(spec), requests[:4], label_set))
    list(run(teacher(spec), requests, label_set))
    totals = label_set.totals()
    assert totals.num_samples == totals.num_tokens / 8 == 7


def test_no_requests_commit_nothing(spec: LabelSetSpec, label_set: LabelSet) -> None:
    assert list(run(teacher(spec), [], label_set)) == [LabelProgress()]
    assert list(label_set.log.singles()) == []
