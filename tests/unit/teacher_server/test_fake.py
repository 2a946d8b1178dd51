"""The fake teacher keeps the promises of a real one."""

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest

from storage.columns import arrow_columns
from storage.keys import CountsSpec, LabelSetSpec, MassSpec, StratifiedSpec, ThresholdSpec
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.backends.base import TeacherJob, start_backend
from teacher_server.backends.fake import FakeBackend
from teacher_server.config import FakeBackendConfig
from teacher_server.errors import TeacherError

MakeSpec = Callable[..., LabelSetSpec]
MakeRequest = Callable[..., SampleRequest]


def start(spec: LabelSetSpec, *, max_model_len: int = 64, **faults: int) -> FakeBackend:
    backend = FakeBackendConfig.model_validate(faults)
    return FakeBackend(
        TeacherJob(model="none", backend=backend, spec=spec, max_model_len=max_model_len)
    )


def assert_same(one: LabelledSample, other: LabelledSample) -> None:
    for name in LabelledSample.__dataclass_fields__:
        np.testing.assert_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("mode", ["generate", "score"])
def test_its_samples_pass_the_checks_of_the_store(
    make_spec: MakeSpec, make_request: MakeRequest, mode: str
) -> None:
    spec = make_spec(mode=mode)
    given = [1, 2, 3] if mode == "score" else None
    for sample in start(spec).label([make_request([number], given) for number in range(5)]):
        sample.check(spec)
        assert sample.finish_reason == ("given" if mode == "score" else "length")


def test_its_distributions_sum_to_one(make_spec: MakeSpec, make_request: MakeRequest) -> None:
    (sample,) = start(make_spec()).label([make_request([5, 6])])
    mass = np.exp(sample.topk_logprobs_NK).sum(axis=1) + np.exp(sample.log_tail_mass_N)
    np.testing.assert_allclose(mass, 1.0, rtol=1e-6)


def test_a_sample_is_the_same_in_another_order_and_another_process(
    make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    """Sampling takes the sample's own seed: batches and restarts cannot mix responses."""
    requests = [make_request([number, 3]) for number in range(6)]
    one = {s.key: s for s in start(make_spec()).label(requests)}
    other = {s.key: s for s in start(make_spec()).label(list(reversed(requests[2:])))}
    for key, sample in other.items():
        assert_same(sample, one[key])


def test_two_responses_to_one_prompt_differ(make_spec: MakeSpec, make_request: MakeRequest) -> None:
    requests = [make_request([4], sample_index=index) for index in (0, 1)]
    one, other = start(make_spec()).label(requests)
    assert one.response_ids_R.tolist() != other.response_ids_R.tolist()


def test_another_seed_gives_another_response(
    make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    one, other = (next(start(make_spec(seed=s)).label([make_request([4])])) for s in (0, 1))
    assert one.response_ids_R.tolist() != other.response_ids_R.tolist()


def test_scoring_what_it_generated_gives_the_same_labels(
    make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    (generated,) = start(make_spec()).label([make_request([4, 9])])
    (scored,) = start(make_spec(mode="score")).label(
        [make_request([4, 9], generated.response_ids_R.tolist())]
    )
    np.testing.assert_array_equal(scored.token_logprob_N, generated.token_logprob_N)
    np.testing.assert_array_equal(scored.topk_ids_NK, generated.topk_ids_NK)


def test_a_response_ends_at_its_limit_or_at_the_end_of_the_context(
    make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    (limited,) = start(make_spec(max_tokens=3)).label([make_request([1, 2])])
    assert len(limited.response_ids_R) == 3
    (cut,) = start(make_spec(max_tokens=8), max_model_len=4).label([make_request([1, 2])])
    assert len(cut.response_ids_R) == 2  # 4 - 2


def test_it_counts_the_tokens_of_prompts_and_responses(
    make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    backend = start(make_spec(max_tokens=3))
    list(backend.label([make_request([1, 2]), make_request([1, 2, 4])]))
    assert backend.forward_tokens == 2 + 3 + 3 + 3


def test_requests_are_pulled_one_by_one(make_spec: MakeSpec, make_request: MakeRequest) -> None:
    source = iter([make_request([number]) for number in range(3)])
    next(iter(start(make_spec()).label(source)))
    assert len(list(source)) == 2


def test_stop_strings_are_refused_and_not_ignored(make_spec: MakeSpec) -> None:
    with pytest.raises(TeacherError, match="stop strings"):
        start(make_spec(stop=("\n",)))


@pytest.mark.parametrize(
    ("kind", "sampled"),
    [
        (None, StratifiedSpec(draws=3)),
        (MassSpec(mass=0.5, cap=6), ThresholdSpec(threshold=0.05)),
        (MassSpec(mass=0.5, cap=6), CountsSpec(draws=30)),
    ],
    ids=str,
)
def test_it_makes_every_column_of_every_kind(
    make_spec: MakeSpec, make_request: MakeRequest, kind, sampled
) -> None:
    spec = make_spec(kind=kind, columns=("entropy", "power_sum_10", "power_sums", sampled))
    for sample in start(spec).label([make_request([number]) for number in range(3)]):
        sample.check(spec)
        assert list(sample.optional) == arrow_columns(spec)


def test_only_the_positions_of_the_mask_are_labelled(
    make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    spec, response = make_spec(mode="score"), [7, 8, 9, 10]
    (whole,) = start(spec).label([make_request([4], response)])
    (part,) = start(spec).label([make_request([4], response, mask=[False, True, False, True])])
    part.check(spec)
    assert part.positions_N.tolist() == [1, 3]
    assert part.response_ids_R.tolist() == response
    np.testing.assert_array_equal(part.topk_ids_NK, whole.topk_ids_NK[[1, 3]])


def test_an_answer_that_is_known_gets_more_labels_and_keeps_its_end(
    make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    """Widening a stored sample: the mode is that of the set, the response is that of the sample."""
    narrow, wide = make_spec(max_tokens=5), make_spec(max_tokens=5, k=20, columns=("power_sums",))
    (stored,) = start(narrow).label([make_request([4, 9], sample_index=3)])
    request = SampleRequest(
        key=stored.key,
        sample_index=3,
        prompt_ids_P=stored.prompt_ids_P,
        response_ids_R=stored.response_ids_R,
        sources=(),
        finish_reason="stop",
        stop_reason="\n",
    )
    (upgraded,) = start(wide).label([request])
    upgraded.check(wide)
    assert upgraded.key == stored.key
    assert (upgraded.finish_reason, upgraded.stop_reason) == ("stop", "\n")
    np.testing.assert_array_equal(upgraded.response_ids_R, stored.response_ids_R)
    np.testing.assert_array_equal(upgraded.topk_ids_NK[:, :4], stored.topk_ids_NK)


# -- faults on request -----------------------------------------------------------------------------
class ProcessDiedError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(process: int, number: int) -> None:
        assert (process, number) == (os.getpid(), signal.SIGKILL)
        raise ProcessDiedError

    monkeypatch.setattr("os.kill", die)


@pytest.mark.usefixtures("killed")
@pytest.mark.parametrize(
    ("faults", "finished"),
    [({"crash_after_samples": 2}, 2), ({"poison_token": 3}, 3), ({"poison_token": 77}, 5)],
)
def test_it_dies_when_it_is_asked_to(
    make_spec: MakeSpec, make_request: MakeRequest, faults: dict[str, int], finished: int
) -> None:
    labelled = start(make_spec(), **faults).label([make_request([n, 9]) for n in range(5)])
    found = []
    with pytest.raises(ProcessDiedError) if finished < 5 else nullcontext():
        for sample in labelled:
            found.append(sample.key)
    assert len(found) == finished


def test_it_hangs_at_the_token_that_it_is_given(
    make_spec: MakeSpec, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise ProcessDiedError

    monkeypatch.setattr("time.sleep", sleep)
    labelled = start(make_spec(), hang_token=6).label([make_request([5]), make_request([6])])
    next(labelled)
    assert slept == []
    with pytest.raises(ProcessDiedError):
        next(labelled)
    assert len(slept) == 3


def test_it_is_started_by_its_name(make_spec: MakeSpec) -> None:
    job = TeacherJob(model="none", backend=FakeBackendConfig(), spec=make_spec(), max_model_len=9)
    assert start_backend(job).describe()["backend"] == "fake"
