"""Label columns of rows of logits, against the plain arithmetic over dense rows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storage.dense import label_sample_densely
from storage.keys import ColumnSpec, CountsSpec, LabelSetSpec, MassSpec, StratifiedSpec, sample_key
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.testing import make_spec
from teacher_server.backends import vllm_rows
from teacher_server.backends.vllm_rows import LabelRows, likeliest, ranks
from teacher_server.backends.vllm_samples import EngineRows, to_sample

PADDING = 5
FLOAT32_NATS = 2e-5
ALL_SCALARS: tuple[ColumnSpec, ...] = (
    "entropy",
    "power_sum_10",
    "power_sum_200",
    "power_sum_400",
    "power_sums",
)


def random_logits(num_rows: int, width: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) * 3


def captured(
    request: SampleRequest,
    response_R: np.ndarray,
    logits_NV: torch.Tensor,
    spec: LabelSetSpec,
) -> LabelledSample:
    """The way of a sample through the engine, without the engine."""
    rows = LabelRows(spec)
    logprobs_NV = torch.empty(logits_NV.shape)
    summary = rows.summarize(logits_NV, logprobs_NV)
    samples = None
    if spec.tail_samples is not None:
        keys, positions = [request.key] * len(logits_NV), range(len(logits_NV))
        samples = rows.tail_samples(summary, logprobs_NV, keys, positions)
    columns = rows.assemble(summary, logprobs_NV, torch.from_numpy(response_R).long(), samples)
    return to_sample(
        request,
        response_R,
        EngineRows(*(column.numpy() for column in columns)),
        spec,
        rows.layout,
        finish_reason="length",
        stop_reason=None,
    )


def dense(
    request: SampleRequest,
    response_R: np.ndarray,
    logits_NV: torch.Tensor,
    spec: LabelSetSpec,
) -> LabelledSample:
    logprobs_NV = logits_NV.double().log_softmax(dim=-1).numpy()
    return label_sample_densely(request, response_R, logprobs_NV, spec)


def make_request() -> SampleRequest:
    prompt = np.array([1, 2], dtype=np.int32)
    return SampleRequest(sample_key(prompt, 0), 0, prompt, None, ())


def assert_equal(found: LabelledSample, expected: LabelledSample) -> None:
    np.testing.assert_array_equal(found.topk_ids_NK, expected.topk_ids_NK)
    np.testing.assert_array_equal(found.token_rank_N, expected.token_rank_N)
    assert found.optional.keys() == expected.optional.keys()
    pairs = [
        (found.topk_logprobs_NK, expected.topk_logprobs_NK),
        (found.token_logprob_N, expected.token_logprob_N),
        (found.log_tail_mass_N, expected.log_tail_mass_N),
        *((found.optional[name], expected.optional[name]) for name in expected.optional),
    ]
    for one, other in pairs:
        np.testing.assert_allclose(one, other, atol=FLOAT32_NATS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [70, 20_000])
def test_columns_are_those_of_dense_rows(width: int, dtype: torch.dtype) -> None:
    """With padding folded into the sums; the top-k in one stage (70) and in two (20 000)."""
    spec = make_spec(k=12, vocab_size=width - PADDING, columns=ALL_SCALARS)
    logits_NV = (random_logits(6, width) + torch.arange(width) * 1e-5).to(dtype)
    response_R = np.arange(6, dtype=np.int32)
    found = captured(make_request(), response_R, logits_NV, spec)
    found.check(spec)
    expected = dense(make_request(), response_R, logits_NV, spec)
    if dtype == torch.bfloat16:  # logits tie: which of two equal tokens comes first is open
        np.testing.assert_allclose(
            found.topk_logprobs_NK, expected.topk_logprobs_NK, atol=FLOAT32_NATS
        )
        np.testing.assert_allclose(
            found.optional["entropy"], expected.optional["entropy"], atol=FLOAT32_NATS
        )
    else:
        assert_equal(found, expected)


@pytest.mark.parametrize("columns", [(StratifiedSpec(draws=4),), (CountsSpec(draws=6),)])
@pytest.mark.parametrize("kind", [None, MassSpec(mass=0.6, cap=9)])
def test_tail_samples_are_those_of_dense_rows(
    columns: tuple[ColumnSpec, ...], kind: MassSpec | None
) -> None:
    spec = make_spec(k=9, vocab_size=70 - PADDING, kind=kind, columns=columns)
    logits_NV = random_logits(6, 70)
    response_R = np.arange(6, dtype=np.int32)
    found = captured(make_request(), response_R, logits_NV, spec)
    found.check(spec)
    assert_equal(found, dense(make_request(), response_R, logits_NV, spec))


def test_a_row_with_impossible_tokens_has_finite_sums() -> None:
    """Minus infinity times a probability of zero is not a number, and counts as zero."""
    spec = make_spec(k=4, vocab_size=70, columns=ALL_SCALARS)
    logits_NV = random_logits(3, 70)
    logits_NV[1, 10:40] = -torch.inf
    response_R = np.arange(3, dtype=np.int32)
    found = captured(make_request(), response_R, logits_NV, spec)
    finite = logits_NV.clamp_min(-1e4)
    assert_equal(found, dense(make_request(), response_R, finite, spec))


def test_the_whole_vocabulary_leaves_no_tail() -> None:
    spec = make_spec(k=20, vocab_size=20)
    found = captured(make_request(), np.zeros(2, dtype=np.int32), random_logits(2, 20), spec)
    np.testing.assert_array_equal(found.log_tail_mass_N, [-100.0, -100.0])


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(k=4, vocab_size=70, columns=ALL_SCALARS)
    logits_NV = random_logits(10, 70)
    response_R = np.arange(10, dtype=np.int32)
    whole = captured(make_request(), response_R, logits_NV, spec)
    monkeypatch.setattr(vllm_rows, "CPU_BLOCK_ELEMENTS", 3 * 70)
    assert_equal(captured(make_request(), response_R, logits_NV, spec), whole)


@given(
    k=st.integers(1, 150),
    width=st.integers(150, 5000) | st.integers(2**16, 2**16 + 40),
    seed=st.integers(0, 2**31 - 1),
)
def test_two_stages_find_the_same_tokens_as_one(k: int, width: int, seed: int) -> None:
    rows = random_logits(2, width + 3, seed=seed)[:, :width]  # rows that do not follow each other
    assert torch.equal(likeliest(rows, k), rows.topk(k, dim=-1).indices)


@given(k=st.integers(1, 40), seed=st.integers(0, 2**31 - 1))
def test_a_rank_counts_the_likelier_tokens(k: int, seed: int) -> None:
    """Also among equal values, which rounding to eighths makes frequent."""
    live_NV = (random_logits(5, 40, seed=seed) * 8).round() / 8
    top_NK = live_NV.topk(k, dim=-1).values
    for token in range(40):
        token_N1 = live_NV[:, token : token + 1]
        expected = 1 + (live_NV > token_N1).sum(dim=-1)
        assert torch.equal(ranks(live_NV, top_NK, token_N1).long(), expected)
