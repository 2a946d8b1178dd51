"""The oracle of the teacher tests, checked against plain log-softmax."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from storage.errors import BadLabelError
from storage.keys import LabelSetSpec, SamplingSpec, ThresholdSpec
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


def test_stop_strings_without_a_tokenizer_are_refused_and_not_ignored(
    tiny_teacher: Path, make_spec: MakeSpec
) -> None:
    with pytest.raises(TeacherError, match="has no tokenizer; add its files"):
        start(tiny_teacher, make_spec(stop=("\n",)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapters": ("a" * 32,)}, "a teacher with 1 adapters, and None was given"),
        ({"quantization": "fp8"}, "loads weights as they are stored and knows no fp8 quantisation"),
    ],
)
def test_weights_that_it_would_not_load_are_refused(
    tiny_teacher: Path, make_spec: MakeSpec, change: dict[str, object], words: str
) -> None:
    spec = make_spec()
    teacher = spec.generation.teacher.model_copy(update=change)
    generation = spec.generation.model_copy(update={"teacher": teacher})
    with pytest.raises(TeacherError, match=words):
        start(tiny_teacher, spec.model_copy(update={"generation": generation}))


# -- what is labelled -----------------------------------------------------------------------------
def test_rows_are_reduced_in_chunks_that_do_not_show(
    tiny_teacher: Path,
    make_spec: MakeSpec,
    make_request: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tail samples too, whose rectangles differ in width from chunk to chunk."""
    columns = ("entropy", ThresholdSpec(threshold=0.03))
    for mode, response in (("generate", None), ("score", [5, 9, 2, 30, 7, 7, 8])):
        spec = make_spec(mode=mode, columns=columns, max_tokens=7)
        request = make_request(PROMPT, response)
        (whole,) = start(tiny_teacher, spec).label([request])
        with monkeypatch.context() as changed:
            changed.setattr("teacher_server.backends.transformers_reference.CHUNK_ROWS", 3)
            (chunked,) = start(tiny_teacher, spec).label([request])
        whole.check(spec)
        for name in LabelledSample.__dataclass_fields__:
            np.testing.assert_equal(getattr(chunked, name), getattr(whole, name))


def test_an_answer_without_room_is_empty(
    tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    """It is refused where samples are checked, with a reason, and stops no other sample."""
    backend = start(tiny_teacher, make_spec(max_tokens=8), max_model_len=3)
    (sample,) = backend.label([make_request(PROMPT)])
    assert len(sample.response_ids_R) == len(sample.positions_N) == 0
    with pytest.raises(BadLabelError, match="it has no labelled position"):
        sample.check(make_spec(max_tokens=8))


# -- output layers --------------------------------------------------------------------------------
def save_gemma(directory: Path) -> None:
    """A soft cap behind a tied output layer."""
    config = Gemma2Config(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
    )
    Gemma2ForCausalLM(config).save_pretrained(directory)


def save_phi(directory: Path) -> None:
    """A bias in the output layer."""
    config = PhiConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    model = PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias, std=2.0)
    model.save_pretrained(directory)


@pytest.mark.parametrize("save", [save_gemma, save_phi])
def test_logits_are_those_of_the_model_whatever_follows_its_output_layer(
    tmp_path: Path,
    make_spec: MakeSpec,
    make_request: MakeRequest,
    save: Callable[[Path], None],
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(tmp_path)
    spec = make_spec(mode="score")
    (sample,) = start(tmp_path, spec).label([make_request(PROMPT, [9, 8, 7, 30])])
    rows_RV = dense(tmp_path, sample)[:, :VOCAB_SIZE]
    expected = -np.sort(-rows_RV, axis=1)[:, :4]
    np.testing.assert_allclose(sample.topk_logprobs_NK, expected, atol=1e-5)


@pytest.mark.parametrize("save", [save_gemma, save_phi])
def test_the_output_layer_is_computed_in_its_own_dtype(
    tmp_path: Path,
    make_spec: MakeSpec,
    make_request: MakeRequest,
    save: Callable[[Path], None],
) -> None:
    """A bfloat16 trunk with a float32 head has no ties; bfloat16 logits, of 8 bits, have some."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(tmp_path)
    spec = make_spec(mode="score", k=40)
    generation = spec.generation.model_copy(update={"compute_dtype": "bfloat16"})
    spec = spec.model_copy(update={"generation": generation})
    request = make_request(PROMPT, list(range(2, 30)))
    (sample,) = start(tmp_path, spec).label([request])
    logprobs_NK = sample.topk_logprobs_NK
    assert (np.diff(logprobs_NK, axis=1) < 0).all()
    same = spec.generation.model_copy(update={"head_dtype": "bfloat16"})
    (coarse,) = start(tmp_path, spec.model_copy(update={"generation": same})).label([request])
    assert (np.diff(coarse.topk_logprobs_NK, axis=1) == 0).sum() > 10
    np.testing.assert_allclose(coarse.topk_logprobs_NK[:, 0], logprobs_NK[:, 0], atol=0.1)


def test_a_model_that_goes_round_its_output_layer_is_refused(
    tiny_teacher: Path, make_spec: MakeSpec, make_request: MakeRequest
) -> None:
    backend = start(tiny_teacher, make_spec(mode="score"))
    backend._model.lm_head = torch.nn.Linear(16, 48, bias=False)
    with pytest.raises(TeacherError, match="makes its logits without its output layer"):
        list(backend.label([make_request(PROMPT, [5])]))


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
