"""The exact tail and entropy beside vLLM's top-k, with a stand-in for its sampler."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from teacher_server.backends.vllm_capture import (
    EXTENSION,
    EXTRA_COLUMNS,
    LOG_ZERO,
    LabelCapture,
    _Gather,
)

V = 30
LIVE = 24
K = 5


class Gathered(NamedTuple):
    """The shape of vLLM's result."""

    logprob_token_ids: Tensor
    logprobs: Tensor
    selected_token_ranks: Tensor


def original(logprobs_NV: Tensor, num_logprobs: int, token_ids_N: Tensor) -> Gathered:
    """What vLLM does: the token itself, then the top-k, and the token's rank."""
    token_N1 = token_ids_N[:, None]
    top = logprobs_NV.topk(num_logprobs, dim=-1)
    chosen_N1 = logprobs_NV.gather(1, token_N1)
    return Gathered(
        torch.cat([token_N1, top.indices], dim=1).to(torch.int32),
        torch.cat([chosen_N1, top.values], dim=1),
        (logprobs_NV >= chosen_N1).sum(dim=-1),
    )


def rows(scale: float = 3.0, num_rows: int = 6) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    logits_NV = scale * torch.randn(num_rows, V, generator=random)
    return logits_NV.log_softmax(dim=-1), torch.randint(LIVE, (num_rows,), generator=random)


def capture(logprobs_NV: Tensor, token_ids_N: Tensor, vocab_size: int = LIVE) -> Gathered:
    gather = _Gather(original, K, vocab_size)
    found = gather(logprobs_NV.clone(), K + EXTRA_COLUMNS, token_ids_N)
    assert isinstance(found, Gathered)
    return found


@pytest.mark.parametrize("vocab_size", [LIVE, V])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_tail_and_entropy_equal_the_dense_sums(vocab_size: int, scale: float) -> None:
    logprobs_NV, tokens_N = rows(scale)
    found = capture(logprobs_NV, tokens_N, vocab_size)
    exact_NV = logprobs_NV.double()
    stored = exact_NV[:, :vocab_size].topk(K, dim=-1).indices
    rest = torch.ones_like(exact_NV, dtype=torch.bool).scatter(1, stored, False)
    tail_N = exact_NV.masked_fill(~rest, -torch.inf).logsumexp(dim=-1).clamp_min(LOG_ZERO)
    torch.testing.assert_close(found.logprobs[:, -2].double(), tail_N, rtol=1e-5, atol=1e-5)
    entropy_N = -(exact_NV.exp() * exact_NV).sum(dim=-1)
    torch.testing.assert_close(found.logprobs[:, -1].double(), entropy_N, rtol=1e-5, atol=1e-5)


def test_a_small_tail_is_summed_and_not_subtracted() -> None:
    """24 tokens at -40 nats: one minus the rest is exactly 0 in float32."""
    logits = torch.full((1, V), -40.0)
    logits[0, :K] = 0.0
    found = capture(logits.log_softmax(dim=-1), torch.tensor([0]), vocab_size=V)
    # log((V - K) e^-40 / K) = log(25 / 5) - 40
    assert found.logprobs[0, -2].item() == pytest.approx(-40 + 1.6094379, rel=1e-5)


def test_the_shape_is_that_of_a_request_for_two_more_tokens() -> None:
    logprobs_NV, tokens_N = rows()
    found, wanted = capture(logprobs_NV, tokens_N), original(logprobs_NV, K + 2, tokens_N)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype


def test_the_top_k_and_the_rank_are_those_of_vllm() -> None:
    logprobs_NV, tokens_N = rows()
    found = capture(logprobs_NV, tokens_N)
    wanted = original(logprobs_NV[:, :LIVE], K, tokens_N)
    assert torch.equal(found.logprob_token_ids[:, : 1 + K], wanted.logprob_token_ids)
    assert torch.equal(found.logprobs[:, : 1 + K], wanted.logprobs)
    assert torch.equal(found.selected_token_ranks, wanted.selected_token_ranks)


def test_padding_of_the_vocabulary_is_never_stored_and_its_mass_is_tail() -> None:
    logits = torch.zeros(1, V)
    logits[0, LIVE:] = 5.0  # six padded rows with almost all the probability
    found = capture(logits.log_softmax(dim=-1), torch.tensor([0]))
    assert int(found.logprob_token_ids[:, : 1 + K].max()) < LIVE
    mass = found.logprobs[0, 1 : 1 + K].exp().sum() + found.logprobs[0, -2].exp()
    assert mass.item() == pytest.approx(1.0, abs=1e-6)


def test_impossible_tokens_make_no_nan() -> None:
    logits = torch.zeros(1, V)
    logits[0, 8:] = -torch.inf
    found = capture(logits.log_softmax(dim=-1), torch.tensor([0]))
    # eight equal tokens: entropy log 8, three of them outside the top five
    assert found.logprobs[0, -1].item() == pytest.approx(2.0794415)
    assert found.logprobs[0, -2].exp().item() == pytest.approx(3 / 8)


def test_no_tail_has_the_stored_form_of_zero() -> None:
    logits = torch.full((1, V), -torch.inf)
    logits[0, :K] = 0.0
    assert capture(logits.log_softmax(dim=-1), torch.tensor([0])).logprobs[0, -2] == LOG_ZERO


@pytest.mark.parametrize("num_logprobs", [0, 1, K, K + 1, K + 3])
def test_a_request_that_is_not_ours_is_left_alone(num_logprobs: int) -> None:
    logprobs_NV, tokens_N = rows()
    found = _Gather(original, K, LIVE)(logprobs_NV, num_logprobs, tokens_N)
    for one, other in zip(found, original(logprobs_NV, num_logprobs, tokens_N), strict=True):
        assert torch.equal(one, other)


def test_rows_of_different_requests_are_not_mixed() -> None:
    """A row's labels are the same alone and beside others."""
    logprobs_NV, tokens_N = rows()
    together = capture(logprobs_NV, tokens_N)
    for n in range(len(tokens_N)):
        alone = capture(logprobs_NV[n : n + 1], tokens_N[n : n + 1])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[n])


def test_the_logprobs_that_vllm_goes_on_using_are_not_changed() -> None:
    logprobs_NV, tokens_N = rows()
    before = logprobs_NV.clone()
    _Gather(original, K, LIVE)(logprobs_NV, K + EXTRA_COLUMNS, tokens_N)
    assert torch.equal(logprobs_NV, before)


def test_the_extension_replaces_the_gathering_of_its_worker() -> None:
    class Sampler:
        gather_logprobs: Any = staticmethod(original)

    class Runner:
        sampler = Sampler()

    class Worker(LabelCapture):
        model_runner = Runner()

    worker = Worker()
    assert worker.install_label_capture(K, LIVE) == "Runner"
    assert isinstance(worker.model_runner.sampler.gather_logprobs, _Gather)
    module, name = EXTENSION.rsplit(".", 1)
    assert (module, name) == (LabelCapture.__module__, LabelCapture.__name__)
