"""The oracle of the teacher tests, checked against plain log-softmax."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from storage.keys import LabelSetSpec, SamplingSpec
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from teacher_server.backends.base import TeacherJob
from teacher_server.backends.transformers_reference import TransformersBackend, draw
from teacher_server.config import TransformersBackendConfig
from teacher_server.errors import TeacherError

MakeSpec = Callable[..., LabelSetSpec]
MakeRequest = Callable[..., SampleRequest]
VOCAB_SIZE = 40
PROMPT = [3, 17, 5]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A backend sets the threads of its process; here the process is everybody's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def start(teacher: Path, spec: LabelSetSpec, *, max_model_len: int = 32) -> TransformersBackend:
    return TransformersBackend(
        TeacherJob(
            model=str(teacher),
            backend=TransformersBackendConfig(),
            spec=spec,
            max_model_len=max_model_len,
        )
    )


def dense(teacher: Path, sample: LabelledSample) -> np.ndarray:
    """Log-probs float64[R, V] of a response over all rows of the embedding, by one forward pass."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tokens = np.concatenate([sample.prompt_ids_P, sample.response_ids_R]).astype(np.int64)
    with torch.inference_mode():
        logits_TV = model(torch.from_numpy(tokens)[None]).logits[0]
    rows_RV = logits_TV.double().log_softmax(dim=-1)[len(sample.prompt_ids_P) - 1 : -1]
    found: np.ndarray = rows_RV.numpy()
    return found


@pytest.fixture
def generated(tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest) -> LabelledSample:
    spec = make_spec(max_tokens=10)
    (sample,) = start(tiny_teacher, spec).label([make_request(PROMPT)])
    sample.check(spec)
    return sample


def test_every_label_equals_the_dense_computation(
    tiny_teacher: Path, generated: LabelledSample
) -> None:
    rows_RV = dense(tiny_teacher, generated)
    live_RV = rows_RV[:, :VOCAB_SIZE]
    places = np.arange(len(rows_RV))
    order = np.argsort(-live_RV, axis=1)[:, :4]
    np.testing.assert_array_equal(generated.topk_ids_NK, order)
    top_NK = np.take_along_axis(live_RV, order, 1)
    np.testing.assert_allclose(generated.topk_logprobs_NK, top_NK, atol=1e-5)
    chosen = live_RV[places, generated.response_ids_R]
    np.testing.assert_allclose(generated.token_logprob_N, chosen, atol=1e-5)
    ranks = 1 + (live_RV > chosen[:, None]).sum(axis=1)
    np.testing.assert_array_equal(generated.token_rank_N, ranks)
    # all that is not stored is the tail, the padding of the embedding included
    tail = 1 - np.exp(top_NK).sum(axis=1)
    np.testing.assert_allclose(np.exp(generated.log_tail_mass_N), tail, atol=1e-5)
    entropy = -(np.exp(rows_RV) * rows_RV).sum(axis=1)
    np.testing.assert_allclose(generated.entropy_N, entropy, atol=1e-5)


def test_scoring_a_generated_response_gives_the_same_labels(
    tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest, generated: LabelledSample
) -> None:
    """One pass over the whole text, or one token at a time with a cache."""
    request = make_request(PROMPT, generated.response_ids_R.tolist())
    (scored,) = start(tiny_teacher, make_spec(mode="score")).label([request])
    scored.check(make_spec(mode="score"))
    assert scored.finish_reason == "given"
    np.testing.assert_array_equal(scored.topk_ids_NK, generated.topk_ids_NK)
    for name in ("token_logprob_N", "log_tail_mass_N", "topk_logprobs_NK", "entropy_N"):
        np.testing.assert_allclose(getattr(scored, name), getattr(generated, name), atol=1e-5)


def test_a_greedy_response_is_the_argmax_of_every_position(
    tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    backend = start(tiny_teacher, make_spec(temperature=0.0, max_tokens=6))
    (sample,) = backend.label([make_request(PROMPT)])
    assert sample.token_rank_N.tolist() == [1] * len(sample.response_ids_R)
    np.testing.assert_array_equal(sample.response_ids_R, sample.topk_ids_NK[:, 0])


def test_soft_labels_are_at_temperature_one_whatever_the_sampling(
    tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    """Seen elsewhere: a temperature that silently changes labels, or is silently ignored."""
    hot = start(tiny_teacher, make_spec(temperature=3.0, top_k=5, max_tokens=10))
    (sample,) = hot.label([make_request(PROMPT)])
    rows_RV = dense(tiny_teacher, sample)[:, :VOCAB_SIZE]
    expected = -np.sort(-rows_RV, axis=1)[:, :4]
    np.testing.assert_allclose(sample.topk_logprobs_NK, expected, atol=1e-5)


def test_a_sample_is_the_same_in_another_order(
    tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    requests = [make_request([number, 4]) for number in range(3)]
    backend = start(tiny_teacher, make_spec(max_tokens=5))
    one = {s.key: s.response_ids_R.tolist() for s in backend.label(requests)}
    other = {s.key: s.response_ids_R.tolist() for s in backend.label(reversed(requests))}
    assert one == other


def test_an_end_token_ends_the_response_and_is_kept(
    tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    """Seeds are tried until a response ends early; token 1 is the end."""
    for seed in range(200):
        backend_spec = make_spec(max_tokens=12, seed=seed, temperature=2.0)
        (sample,) = start(tiny_teacher, backend_spec).label([make_request(PROMPT)])
        if sample.finish_reason == "stop":
            break
    assert sample.response_ids_R[-1] == 1
    assert 1 not in sample.response_ids_R[:-1]
    assert len(sample.positions_N) == len(sample.response_ids_R)


def test_a_response_ends_at_the_end_of_the_context(
    tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    spec = make_spec(max_tokens=8, temperature=0.0)
    (sample,) = start(tiny_teacher, spec, max_model_len=5).label([make_request(PROMPT)])
    assert len(sample.response_ids_R) <= 2  # 5 - 3


def test_the_tokens_of_every_forward_pass_are_counted(
    tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    backend = start(tiny_teacher, make_spec(mode="score"))
    list(backend.label([make_request(PROMPT, [7, 8])]))
    assert backend.forward_tokens == 4  # the last token predicts nothing


def test_stop_strings_are_refused_and_not_ignored(tiny_teacher: Path, make_spec: MakeSpec) -> None:
    with pytest.raises(TeacherError, match="knows no stop strings; use vllm"):
        start(tiny_teacher, make_spec(stop=("\n",)))


# -- drawing --------------------------------------------------------------------------------------
PROBABILITIES = torch.tensor([0.05, 0.4, 0.3, 0.05, 0.2], dtype=torch.float64)


def drawn(num_draws: int = 400, **settings: object) -> np.ndarray:
    """Share of every token in many draws."""
    sampling = SamplingSpec.model_validate(
        {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "max_tokens": 1,
            "stop": (),
            "seed": 0,
            **settings,
        }
    )
    generator = torch.Generator().manual_seed(0)
    tokens = [draw(PROBABILITIES.log(), sampling, generator) for _ in range(num_draws)]
    return np.bincount(tokens, minlength=5) / num_draws


def test_draws_follow_the_distribution() -> None:
    # the standard deviation of a share is at most sqrt(0.25 / 2000) = 0.011
    np.testing.assert_allclose(drawn(2000), PROBABILITIES, atol=0.05)


def test_a_temperature_flattens_the_distribution() -> None:
    # at T = 2 shares are as square roots: .2236 .6325 .5477 .2236 .4472, sum 2.0746
    expected = np.array([0.108, 0.305, 0.264, 0.108, 0.216])
    np.testing.assert_allclose(drawn(2000, temperature=2.0), expected, atol=0.05)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert drawn(5, temperature=0.0).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 2, 4]),
        ({"top_k": 100}, [0, 1, 2, 3, 4]),
        # 0.4 + 0.3 reaches 0.7 with two tokens; 0.71 needs the third
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.69}, [1, 2]),
        ({"top_p": 0.71}, [1, 2, 4]),
        # relative to 0.4: 0.2 is 0.5 of it
        ({"min_p": 0.49}, [1, 2, 4]),
        ({"min_p": 0.51}, [1, 2]),
        ({"min_p": 1.0}, [1]),
        # after top_k the rest is normalised: 0.4 / 0.7 = 0.571
        ({"top_k": 2, "top_p": 0.56}, [1]),
        ({"top_k": 2, "top_p": 0.58}, [1, 2]),
        # the temperature comes first: 0.2 ** 2 / 0.4 ** 2 = 0.25
        ({"min_p": 0.3, "temperature": 0.5}, [1, 2]),
    ],
    ids=str,
)
def test_limits_leave_only_the_tokens_that_they_name(
    settings: dict[str, float], allowed: list[int]
) -> None:
    assert np.flatnonzero(drawn(**settings)).tolist() == allowed
