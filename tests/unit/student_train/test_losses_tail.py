"""Tail treatments: what they compare, and what they say to the student's tail."""

import math

import pytest
import torch
from torch import Tensor

from student_train.losses import DIVERGENCES
from student_train.losses.base import NEG_INF, PADDING_ID, TeacherRows
from student_train.losses.config import soft_config
from student_train.losses.reference import reference_soft
from student_train.losses.soft_term import as_soft_term, make_divergence
from student_train.losses.tvd import tvd
from tests.unit.student_train.written_gradient import Written

EXACT = 1e-10
"""Sums of some dozens of float64 terms."""

V = 12
SCHEDULE = {"t": 0.3}

every = pytest.mark.parametrize("name", DIVERGENCES)
ablated = pytest.mark.parametrize("tail", ["renorm", "zero"])


def make_rows(num_rows: int = 4, k: int = 5, seed: int = 0) -> TeacherRows:
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_rows, V, generator=random, dtype=torch.float64)
    ordered, ids = logits.log_softmax(dim=-1).sort(dim=-1, descending=True)
    return TeacherRows(
        hard_M=ids[:, 0],
        topk_ids_MK=ids[:, :k],
        topk_logprobs_MK=ordered[:, :k],
        log_tail_mass_M=ordered[:, k:].logsumexp(dim=-1),
    )


def make_logits(num_rows: int = 4, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, V, generator=random, dtype=torch.float64).requires_grad_()


def categories(logits: Tensor, rows: TeacherRows, temperature: float = 1.0) -> Tensor:
    logprobs = (logits / temperature).log_softmax(dim=-1)
    stored = logprobs.gather(-1, rows.topk_ids_MK)
    rest = logprobs.scatter(-1, rows.topk_ids_MK, NEG_INF).logsumexp(dim=-1, keepdim=True)
    return torch.cat([stored, rest], dim=-1)


@every
@ablated
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_value_and_gradient_equal_the_reference(name: str, tail: str, temperature: float) -> None:
    config = soft_config(
        {"type": name, "tail": tail, "temperature": temperature, "temperature_squared": True}
    )
    rows, logits = make_rows(), make_logits()
    term = make_divergence(config, schedule=SCHEDULE)
    student = categories(logits, rows, term.temperature)
    found = Written.apply(term.teacher_categories(rows, torch.float64), student, term)
    expected = reference_soft(logits, rows, divergence=config, schedule=SCHEDULE)
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
    (one,), (other,) = (
        torch.autograd.grad(value.sum(), logits, retain_graph=True) for value in (found, expected)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=EXACT)


@every
def test_renormalising_leaves_the_students_tail_alone(name: str) -> None:
    config = soft_config({"type": name, "tail": "renorm"})
    rows, logits = make_rows(), make_logits()
    term = make_divergence(config, schedule=SCHEDULE)
    found = Written.apply(rows.categories(torch.float64), categories(logits, rows), term)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    outside = torch.ones_like(gradient).scatter(-1, rows.topk_ids_MK, 0.0)
    assert float((gradient * outside).abs().max()) < EXACT


def test_an_empty_tail_pushes_all_mass_onto_the_stored_tokens() -> None:
    """Forward KL then is -log Q + KL(p / P, q / Q): smallest at Q = 1."""
    rows, logits = make_rows(), make_logits()
    student = categories(logits, rows).detach()
    head = student[:, :-1].logsumexp(dim=-1)
    zero, _ = make_divergence(soft_config({"type": "forward_kl", "tail": "zero"}))(
        rows.categories(torch.float64), student
    )
    renorm, _ = make_divergence(soft_config({"type": "forward_kl", "tail": "renorm"}))(
        rows.categories(torch.float64), student
    )
    torch.testing.assert_close(zero, renorm - head, rtol=0, atol=EXACT)


@every
@ablated
def test_all_treatments_are_the_bucket_where_nothing_is_outside(name: str, tail: str) -> None:
    rows, logits = make_rows(k=V), make_logits()
    results = []
    for treatment in ("bucket", tail):
        term = make_divergence(soft_config({"type": name, "tail": treatment}), schedule=SCHEDULE)
        teacher = term.teacher_categories(rows, torch.float64)
        value = Written.apply(teacher, categories(logits, rows), term)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), logits)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT)


@every
@ablated
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_rows_stay_finite(name: str, tail: str, dtype: torch.dtype) -> None:
    teacher = torch.tensor([[math.log(1e-9), NEG_INF, math.log(1 - 1e-9)]], dtype=dtype)
    student = torch.tensor([[-40.0, -1e4, 0.0]], dtype=dtype).log_softmax(dim=-1)
    term = make_divergence(soft_config({"type": name, "tail": tail}), schedule=SCHEDULE)
    value, gradient = term(teacher, student)
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(gradient).all())


# -- rows ------------------------------------------------------------------------------------------
def test_a_plain_divergence_is_a_soft_term_with_nothing_set() -> None:
    term = as_soft_term(tvd)
    assert (term.tail, term.temperature, term.scale, term.sampled) == ("bucket", 1.0, 1.0, False)
    assert as_soft_term(term) is term


def test_repeated_tokens_count_once() -> None:
    rows = TeacherRows(
        hard_M=torch.tensor([3, 4]),
        topk_ids_MK=torch.tensor([[3, 5, 3, 3], [4, PADDING_ID, 2, PADDING_ID]]),
        topk_logprobs_MK=torch.tensor([[0.5, 0.3, 0.5, 0.5], [0.6, 0.1, 0.2, 0.1]]).log(),
        log_tail_mass_M=torch.tensor([0.2, 0.2]).log(),
    )
    assert rows.distinct().topk_ids_MK.tolist() == [[3, 5, -1, -1], [4, -1, 2, -1]]
    found = rows.distinct().categories(torch.float32).exp()
    assert found.tolist() == [
        pytest.approx([0.5, 0.3, 0.0, 0.0, 0.2], abs=1e-6),
        pytest.approx([0.6, 0.0, 0.2, 0.0, 0.2], abs=1e-6),
    ]


def test_rows_carry_their_optional_tensors_along() -> None:
    rows = make_rows()
    full = TeacherRows(
        rows.hard_M,
        rows.topk_ids_MK,
        rows.topk_logprobs_MK,
        rows.log_tail_mass_M,
        entropy_M=torch.arange(4.0),
        log_power_sums={"50": torch.arange(4.0)},
        tail_ids_MS=torch.arange(8).reshape(4, 2),
        samples_cover_all=True,
    )
    part = full.rows(1, 3).to(torch.device("cpu"))
    assert len(part) == 2
    assert part.entropy_M is not None
    assert part.entropy_M.tolist() == [1.0, 2.0]
    assert part.log_power_sums["50"].tolist() == [1.0, 2.0]
    assert part.tail_ids_MS is not None
    assert part.tail_ids_MS.tolist() == [[2, 3], [4, 5]]
    assert part.samples_cover_all
    assert part.token_logprob_M is None
    assert part.power_slopes == {}
