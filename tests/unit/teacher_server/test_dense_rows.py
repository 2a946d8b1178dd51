"""Labels made on the device equal those of the plain reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storage.dense import label_sample_densely
from storage.keys import (
    CountsSpec,
    LabelSetSpec,
    MassSpec,
    StratifiedSpec,
    ThresholdSpec,
    TopKSpec,
    sample_key,
)
from storage.selection import SampleRequest
from storage.testing import make_spec
from teacher_server.dense_rows import joined, label_rows

NAMES = ("entropy", "power_sum_10", "power_sum_200", "power_sum_400", "power_sums")
FIELDS = (
    "token_logprob_N",
    "token_rank_N",
    "log_tail_mass_N",
    "topk_ids_NK",
    "topk_logprobs_NK",
)
PROMPT = np.array([4, 2], np.int32)

KINDS = st.one_of(
    st.builds(TopKSpec, k=st.integers(1, 12)),
    st.builds(MassSpec, mass=st.floats(0.05, 0.95), cap=st.integers(1, 12)),
)
SAMPLED = st.sampled_from(
    [(), (StratifiedSpec(draws=3),), (ThresholdSpec(threshold=0.05),), (CountsSpec(draws=9),)]
)


def assert_equal_to_the_reference(logprobs_RV: torch.Tensor, spec: LabelSetSpec, cut: int) -> None:
    """Rows in two parts, against the dense labels of the whole."""
    response = np.random.default_rng(len(logprobs_RV)).integers(
        0, spec.vocab_size, size=len(logprobs_RV)
    )
    key = sample_key(PROMPT, 0, response_ids=response)
    request = SampleRequest(key, 0, PROMPT, response.astype(np.int32), ())
    expected = label_sample_densely(request, response, logprobs_RV.double().numpy(), spec)
    positions = np.arange(len(response))
    found = joined(
        [
            label_rows(logprobs_RV[part], response[part], positions[part], spec, key)
            for part in (slice(None, cut), slice(cut, None))
        ]
    )
    for name in FIELDS:
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert list(found.optional) == list(expected.optional)
    for name, values in expected.optional.items():
        assert found.optional[name].dtype == values.dtype
        np.testing.assert_allclose(found.optional[name], values, rtol=1e-5, atol=1e-6)


@given(KINDS, SAMPLED, st.integers(0, 2**32), st.integers(0, 5))
def test_all_columns_equal_the_plain_reference(kind, sampled, seed: int, num_padded: int) -> None:
    """Over a padded output layer; distributions from flat to nearly certain."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([0.1, 1.0, 3.0, 10.0, 30.0, 60.0])[:, None]
    logits_RV = scales * torch.randn(6, 40, generator=generator)
    spec = make_spec(kind=kind, columns=(*NAMES, *sampled), vocab_size=40 - num_padded)
    assert_equal_to_the_reference(logits_RV.log_softmax(dim=-1), spec, 1 + seed % 5)


def test_tokens_that_cannot_occur_count_for_nothing() -> None:
    logits_RV = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    logits_RV[:, 20:] = -torch.inf
    spec = make_spec(k=4, columns=(*NAMES, StratifiedSpec(draws=5)), vocab_size=20)
    assert_equal_to_the_reference(logits_RV.log_softmax(dim=-1), spec, 2)


@pytest.mark.parametrize("sampled", [(), (CountsSpec(draws=3),)])
def test_no_rows_are_no_labels(sampled) -> None:
    spec = make_spec(k=4, columns=(*NAMES, *sampled), vocab_size=20)
    empty = np.zeros(0, np.int64)
    found = label_rows(torch.zeros(0, 24), empty, empty, spec, "0" * 32)
    assert found.topk_ids_NK.shape == (0, 4)
    assert {len(values) for values in found.optional.values()} == {0}
