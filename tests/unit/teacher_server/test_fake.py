"""The fake teacher keeps the promises of a real one."""

from collections.abc import Callable

import numpy as np
import pytest

from storage.keys import LabelSetSpec
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.backends.base import TeacherJob, start_backend
from teacher_server.backends.fake import FakeBackend
from teacher_server.config import FakeBackendConfig
from teacher_server.errors import TeacherError

MakeSpec = Callable[..., LabelSetSpec]
MakeRequest = Callable[..., SampleRequest]


def start(spec: LabelSetSpec, *, max_model_len: int = 64) -> FakeBackend:
    return FakeBackend(
        TeacherJob(
            model="none", backend=FakeBackendConfig(), spec=spec, max_model_len=max_model_len
        )
    )


def assert_same(one: LabelledSample, other: LabelledSample) -> None:
    for name in LabelledSample.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


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


def test_it_is_started_by_its_name(make_spec: MakeSpec) -> None:
    job = TeacherJob(model="none", backend=FakeBackendConfig(), spec=make_spec(), max_model_len=9)
    assert start_backend(job).describe()["backend"] == "fake"
