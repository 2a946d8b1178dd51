"""The teacher at another temperature: exact at stored exponents, bounded between them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from storage.columns import POWERS
from student_train.errors import PreflightError
from student_train.losses import DIVERGENCES
from student_train.losses.base import PADDING_ID, TeacherRows
from student_train.losses.config import soft_config
from student_train.losses.reference import dense_divergence
from student_train.losses.soft_term import make_divergence
from student_train.losses.temperature import (
    INTERPOLATION_ERROR,
    LARGEST_TAIL,
    teacher_categories_at,
)

EXACT = 1e-9
"""Differences of float64 sums of V terms."""

SMOOTH = 0.01
"""Error between stored exponents for tails without a cliff, with 16 stored tokens or more."""

V = 300
STORED = sorted(1 / alpha for alpha in POWERS.values() if alpha >= 0.25)
"""Temperatures with a power sum of their own, 1/4 and 1/2 among them; 10 is apart."""


def make_rows(
    k: int, *, rows: int = 6, seed: int = 0, scale: float = 2.5, v: int = V
) -> tuple[TeacherRows, Tensor]:
    """Labels with all scalars, in float64, and the dense log-probs, likeliest first."""
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, v, generator=random, dtype=torch.float64)
    ordered, ids = logits.log_softmax(dim=-1).sort(dim=-1, descending=True)
    return replace(label(ordered, k), hard_M=ids[:, 0], topk_ids_MK=ids[:, :k]), ordered


def dense_at(ordered: Tensor, k: int, temperature: float) -> Tensor:
    return merge((ordered / temperature).log_softmax(dim=-1), k)


def merge(ordered: Tensor, k: int) -> Tensor:
    rest = ordered[:, k:].logsumexp(dim=-1, keepdim=True)
    return torch.cat([ordered[:, :k], rest], dim=-1)


@pytest.mark.parametrize("temperature", [1.0, *STORED, 10.0])
@pytest.mark.parametrize("k", [1, 20, V - 1, V])
def test_stored_temperatures_are_exact(temperature: float, k: int) -> None:
    rows, ordered = make_rows(k)
    found = teacher_categories_at(rows, temperature, torch.float64)
    expected = dense_at(ordered, k, temperature)
    torch.testing.assert_close(found.exp(), expected.exp(), rtol=0, atol=EXACT)


def shaped(shape: str, size: float, v: int) -> Tensor:
    """Log-probs of teachers of very different shapes, likeliest first."""
    if shape == "normal":
        logits = size * torch.randn(v, generator=torch.Generator().manual_seed(0)).double()
    elif shape == "power law":
        logits = -size * torch.arange(1, v + 1).double().log()
    else:  # some sure tokens, and a mass of exp(-2 size) spread over all others
        sure = 100 if shape == "plateau" else 1
        logits = torch.full((v,), -2 * size - math.log(v), dtype=torch.float64)
        logits[:sure] = -math.log(sure)
    return logits.sort(descending=True).values.log_softmax(dim=-1)[None]


def label(ordered: Tensor, k: int) -> TeacherRows:
    """Labels with all scalars of teachers whose ids are their ranks."""
    num_rows, v = ordered.shape
    tail = ordered[:, k:].logsumexp(dim=-1) if k < v else torch.full((num_rows,), -math.inf)
    sums = {name: (alpha * ordered).logsumexp(dim=-1) for name, alpha in POWERS.items()}
    slopes = {
        name: ((alpha * ordered).softmax(dim=-1) * ordered).sum(dim=-1)
        for name, alpha in POWERS.items()
        if 0.25 <= alpha < 1
    }
    return TeacherRows(
        hard_M=torch.zeros(num_rows, dtype=torch.int64),
        topk_ids_MK=torch.arange(k).expand(num_rows, k),
        topk_logprobs_MK=ordered[:, :k],
        log_tail_mass_M=tail.double(),
        entropy_M=-(ordered.exp() * ordered).sum(dim=-1),
        log_power_sums=sums,
        power_slopes=slopes,
    )


def rounded(rows: TeacherRows) -> TeacherRows:
    """As the store keeps them: log-probs in steps of 1/256 nat, scalars in float32."""
    assert rows.entropy_M is not None
    return replace(
        rows,
        topk_logprobs_MK=(rows.topk_logprobs_MK * 256).round() / 256,
        log_tail_mass_M=rows.log_tail_mass_M.float(),
        entropy_M=rows.entropy_M.float(),
        log_power_sums={name: x.float() for name, x in rows.log_power_sums.items()},
        power_slopes={name: x.float() for name, x in rows.power_slopes.items()},
    )


@pytest.mark.parametrize("shape", ["normal", "power law", "needle", "plateau"])
@pytest.mark.parametrize("k", [16, 64])
@given(
    size=st.floats(0.0, 10.0), temperature=st.floats(1.0, 4.0), vocab=st.sampled_from([200, 1500])
)
def test_between_stored_exponents_smooth_tails_have_a_small_error(
    shape: str, k: int, size: float, temperature: float, vocab: int
) -> None:
    ordered = shaped(shape, size, vocab)
    expected = dense_at(ordered, k, temperature)
    for rows in (label(ordered, k), rounded(label(ordered, k))):
        found = teacher_categories_at(rows, temperature, torch.float64)
        assert float((found.exp() - expected.exp()).abs().max()) <= SMOOTH


@given(
    k=st.integers(1, 20),
    gaps=st.lists(st.floats(0.0, 30.0), min_size=3, max_size=3),
    counts=st.lists(st.integers(1, 40_000), min_size=3, max_size=3),
    temperature=st.floats(1.0, 4.0),
)
def test_between_stored_exponents_any_tail_keeps_the_declared_error(
    k: int, gaps: list[float], counts: list[int], temperature: float
) -> None:
    """Tails of up to three levels: where they differ much, the curve has a sharp bend."""
    levels = torch.tensor([-sum(gaps[: n + 1]) for n in range(3)], dtype=torch.float64)
    head = torch.linspace(1.0, 0.0, k, dtype=torch.float64)
    logits = torch.cat([head, levels.repeat_interleave(torch.tensor(counts))])
    ordered = logits.log_softmax(dim=-1)[None]
    expected = dense_at(ordered, k, temperature)
    for rows in (label(ordered, k), rounded(label(ordered, k))):
        found = teacher_categories_at(rows, temperature, torch.float64)
        assert float((found.exp() - expected.exp()).abs().max()) <= INTERPOLATION_ERROR


def test_the_worst_tail_that_was_found_keeps_the_declared_error() -> None:
    logits = torch.cat([torch.tensor([4.41, 3.70]), torch.full((127_000,), -27.88)]).double()
    ordered = logits.log_softmax(dim=-1)[None]
    found = teacher_categories_at(label(ordered, 1), 2.5757, torch.float64)
    error = float((found.exp() - dense_at(ordered, 1, 2.5757).exp()).abs().max())
    assert 0.8 * INTERPOLATION_ERROR < error <= INTERPOLATION_ERROR


def test_one_token_in_the_place_of_the_tail_would_be_far_off() -> None:
    """Seen elsewhere: raising the tail mass to the power, as if it were a single token."""
    ordered = shaped("normal", 1.0, 5000)
    expected = dense_at(ordered, 64, 3.0)
    single = (merge(ordered, 64) / 3.0).log_softmax(dim=-1)
    assert float((single.exp() - expected.exp()).abs().max()) > 50 * SMOOTH


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0, 4.0])
def test_a_divergence_at_a_temperature_is_the_dense_one(
    name: str, squared: bool, temperature: float
) -> None:
    options: dict[str, Any] = {
        "type": name,
        "temperature": temperature,
        "temperature_squared": squared,
    }
    rows, ordered = make_rows(V)
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(6, V, generator=random, dtype=torch.float64)
    config, schedule = soft_config(options), {"t": 0.6}
    term = make_divergence(config, schedule=schedule)
    student = (logits / temperature).log_softmax(dim=-1)
    padded = torch.nn.functional.pad(student, (0, 1), value=-math.inf)
    found, _ = term(term.teacher_categories(rows, torch.float64), padded)
    teacher = (ordered / temperature).log_softmax(dim=-1)
    dense = dense_divergence(config, teacher, student, schedule=schedule)
    factor = temperature**2 if squared else 1.0
    torch.testing.assert_close(found, factor * dense, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("temperature", STORED)
@pytest.mark.parametrize("k", [8, 64, V - 1, V])
def test_rounded_labels_stay_close_and_keep_their_tail(temperature: float, k: int) -> None:
    for scale in (1.0, 3.0, 6.0):
        rows, ordered = make_rows(k, scale=scale)
        found = teacher_categories_at(rounded(rows), temperature, torch.float64)
        expected = dense_at(ordered, k, temperature)
        # a step is 1/256 nat: log-probs are off by up to half of it, times the exponent
        allowed = max(1.0, 1 / temperature) / 512
        assert float((found.exp() - expected.exp()).abs().max()) < allowed
        assert bool((torch.isneginf(found[:, -1]) == torch.isneginf(expected[:, -1])).all())


def test_unused_entries_do_not_count() -> None:
    rows, _ = make_rows(10)
    padded = replace(
        rows,
        topk_ids_MK=torch.nn.functional.pad(rows.topk_ids_MK, (0, 2), value=PADDING_ID),
        topk_logprobs_MK=torch.nn.functional.pad(rows.topk_logprobs_MK, (0, 2), value=-50.0),
    )
    found = teacher_categories_at(padded, 2.0, torch.float64)
    expected = teacher_categories_at(rows, 2.0, torch.float64)
    torch.testing.assert_close(found[:, :10], expected[:, :10], rtol=0, atol=EXACT)
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=0, atol=EXACT)
    assert bool(torch.isneginf(found[:, 10:12]).all())


def test_extreme_teachers_stay_finite() -> None:
    rows, _ = make_rows(4)
    one_hot = torch.tensor([[0.0, -40.0, -50.0, -60.0]]).double().expand(6, 4)
    zeros = torch.zeros(6, dtype=torch.float64)
    for log_tail in (-math.inf, -100.0, math.log(1e-10)):
        extreme = replace(
            rows,
            topk_logprobs_MK=one_hot,
            log_tail_mass_M=torch.full((6,), log_tail, dtype=torch.float64),
            entropy_M=zeros,
            log_power_sums=dict.fromkeys(POWERS, zeros),
            power_slopes={"25": zeros, "50": zeros, "75": zeros},
        )
        for temperature in (1.1, 2.0, 3.0):
            found = teacher_categories_at(extreme, temperature, torch.float32)
            assert not bool(torch.isnan(found).any())
            assert bool((found.exp().sum(dim=-1) - 1.0).abs().max() < 1e-5)
            assert bool(torch.isneginf(found[:, -1]).all()) == math.isinf(log_tail)


@pytest.mark.parametrize(
    ("temperature", "keep", "message"),
    [
        (2.0, (), r"temperature 2 needs the sum of p\*\*0.5; the labels hold exponents \[\]"),
        (
            1.1,
            ("sums",),
            r"exponents \[0.1, 0.25, 0.5, 0.75, 2.0, 4.0\], with slopes \[0.25, 0.5, 0.75\]",
        ),
        (6.0, ("sums", "entropy"), r"with slopes \[0.25, 0.5, 0.75, 1.0\]"),
        (0.7, ("sums", "entropy"), r"needs the sum of p\*\*1.42857;"),
        (0.5, (), r"needs the sum of p\*\*2;"),
    ],
)
def test_missing_power_sums_are_named(
    temperature: float, keep: tuple[str, ...], message: str
) -> None:
    rows, _ = make_rows(5)
    if "entropy" not in keep:
        rows = replace(rows, entropy_M=None)
    if "sums" not in keep:
        rows = replace(rows, log_power_sums={}, power_slopes={})
    with pytest.raises(PreflightError, match=message):
        teacher_categories_at(rows, temperature, torch.float64)


@pytest.mark.parametrize("temperature", [0.25, 0.5])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_rounded_labels_below_temperature_one_keep_a_tail_that_is_possible(
    temperature: float, k: int
) -> None:
    """The tail's sum is far below the rounding of the head: it is kept between its bounds."""
    alpha = 1 / temperature
    rows, ordered = make_rows(k, scale=4.0)
    found = teacher_categories_at(rounded(rows), temperature, torch.float64)[:, -1]
    tail = ordered[:, k:]
    share = alpha * ordered.logsumexp(dim=-1) - (alpha * ordered).logsumexp(dim=-1)
    lowest = alpha * tail.logsumexp(dim=-1) - (alpha - 1) * LARGEST_TAIL + share
    highest = tail.logsumexp(dim=-1) + (alpha - 1) * ordered[:, k - 1] + share
    slack = 2 * alpha / 256  # head and bound are rounded
    assert bool((found >= lowest - slack).all())
    assert bool((found <= highest + slack).all())
