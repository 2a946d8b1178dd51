"""What holds for every divergence: its value and its written gradient are those of its definition.

The definitions are in ``reference.py``: probabilities and autograd. Categories are the last axis;
the last category is the tail.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from student_train.losses import DIVERGENCES
from student_train.losses.base import NEG_INF, Divergence
from student_train.losses.config import DivergenceConfig, soft_config
from student_train.losses.reference import FORMULAS, dense_divergence
from student_train.losses.soft_term import make_divergence
from tests.unit.student_train.written_gradient import Written

V = 23

EXACT = 1e-10
"""Sums of some dozens of float64 terms, relative to the largest entry."""
FULL_VOCABULARY = 1e-9
"""With every token stored, against the formula on the full vocabulary, absolute."""
SINGLE = 2e-5
"""float32 against float64: 2**-24 for each operation, amplified by the logs."""
ROUNDING = 1e-12
"""How far below 0 a float64 sum may come out that is 0 or more."""
ROUNDING_OF_LARGE_TERMS = 1e-9
"""The same where negative exponents make single terms as large as exp(15)."""

CASES: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    name: ({"type": name}, {"t": 0.4} if name == "taid" else {}) for name in DIVERGENCES
}
CASES |= {
    "reverse_kl, high floor": ({"type": "reverse_kl", "log_floor": -3.0}, {}),
    "jsd, 0.1": ({"type": "jsd", "beta": 0.1}, {}),
    "jsd, 0.95": ({"type": "jsd", "beta": 0.95}, {}),
    "jsd, 0": ({"type": "jsd", "beta": 0.0}, {}),
    "jsd, 1": ({"type": "jsd", "beta": 1.0}, {}),
    "skew_forward_kl, 0": ({"type": "skew_forward_kl", "skew": 0.0}, {}),
    "skew_forward_kl, 0.9": ({"type": "skew_forward_kl", "skew": 0.9}, {}),
    "skew_reverse_kl, 0.9": ({"type": "skew_reverse_kl", "skew": 0.9}, {}),
    "adaptive_kl, 0.9": ({"type": "adaptive_kl", "head_mass": 0.9}, {}),
    "adaptive_kl, within": ({"type": "adaptive_kl", "head": "within", "head_mass": 0.7}, {}),
    "adaptive_kl, through": ({"type": "adaptive_kl", "through_weights": True}, {}),
    "entropy_adaptive_kl, 2": ({"type": "entropy_adaptive_kl", "sharpness": 2.0}, {}),
    "entropy_adaptive_kl, fixed": ({"type": "entropy_adaptive_kl", "through_weights": False}, {}),
    "taid, student": ({"type": "taid"}, {"t": 0.0}),
    "taid, teacher": ({"type": "taid"}, {"t": 1.0}),
    "taid, kl": ({"type": "taid", "value": "kl"}, {"t": 0.7}),
}
CASES |= {
    f"alpha_beta, {alpha:g} {beta:g}": ({"type": "alpha_beta", "alpha": alpha, "beta": beta}, {})
    for alpha, beta in [
        (1, 0),
        (0, 1),
        (0.5, 0.5),
        (0, 0),
        (0.5, 0),
        (0, 0.3),
        (0.5, -0.5),
        (-0.5, 0.5),
        (1.5, -0.3),
        (-0.5, 0.2),
    ]
}
F_DIVERGENCES = [
    name
    for name, (options, _) in CASES.items()
    if options["type"]
    in {"forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"}
    and "floor" not in name
]
F_DIVERGENCES += ["alpha_beta, 1 0", "alpha_beta, 0 1", "alpha_beta, 0.5 0.5"]  # alpha + beta = 1

every = pytest.mark.parametrize("case", CASES)


def made(case: str) -> tuple[DivergenceConfig, Divergence, dict[str, float]]:
    options, schedule = CASES[case]
    config = soft_config(options)
    return config, make_divergence(config, schedule=schedule), schedule


def random_logprobs(rows: int, width: int, *, seed: int, scale: float = 2.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, width, generator=random, dtype=torch.float64)
    return logits.log_softmax(dim=-1)


def merged(logprobs_MV: Tensor, k: int) -> Tensor:
    """The first k tokens and the rest as one category."""
    rest_M1 = logprobs_MV[:, k:].logsumexp(dim=-1, keepdim=True)
    return torch.cat([logprobs_MV[:, :k], rest_M1], dim=-1)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=tolerance * scale, equal_nan=False
    )


def test_every_divergence_has_options_and_a_definition() -> None:
    assert set(FORMULAS) == set(DIVERGENCES)
    assert {soft_config(name).type for name in DIVERGENCES} == set(DIVERGENCES)


# -- value and gradient ----------------------------------------------------------------------------
@every
@pytest.mark.parametrize("scale", [0.1, 2.0, 12.0])
def test_value_and_gradient_on_categories_equal_the_definition(case: str, scale: float) -> None:
    config, divergence, schedule = made(case)
    teacher = random_logprobs(16, 9, seed=1, scale=scale)
    student = random_logprobs(16, 9, seed=2).requires_grad_()
    value, gradient = divergence(teacher, student.detach())
    expected = dense_divergence(config, teacher, student, schedule=schedule, has_tail=True)
    assert_close(value, expected.detach())
    assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0])


@every
def test_all_tokens_stored_is_the_full_vocabulary_formula(case: str) -> None:
    """K = V: the tail of both is empty, in value and in the gradient of the logits."""
    config, divergence, schedule = made(case)
    teacher = random_logprobs(8, V, seed=3)
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(8, V, generator=random, dtype=torch.float64).requires_grad_()
    student = logits.log_softmax(dim=-1)
    expected = dense_divergence(config, teacher, student, schedule=schedule)
    empty = torch.full((8, 1), NEG_INF, dtype=torch.float64)
    found = Written.apply(
        torch.cat([teacher, empty], -1), torch.cat([student, empty], -1), divergence
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=FULL_VOCABULARY)
    (written,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)
    (dense,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(written, dense, rtol=0, atol=FULL_VOCABULARY)


HELD_FIXED = {
    # the derivative holds the target or the weights fixed, so it is not that of the value
    case
    for case, (options, schedule) in CASES.items()
    if (options["type"] == "taid" and schedule["t"] < 1)
    or (options["type"] == "adaptive_kl" and "through_weights" not in options)
    or options.get("through_weights") is False
}


@pytest.mark.parametrize("case", [case for case in CASES if case not in HELD_FIXED])
def test_the_written_gradient_passes_gradcheck(case: str) -> None:
    """Independent of autograd: against differences of the written value."""
    _, divergence, _ = made(case)
    teacher = random_logprobs(4, 6, seed=5)
    random = torch.Generator().manual_seed(6)
    logits = torch.randn(4, 6, generator=random, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: Written.apply(teacher, z.log_softmax(dim=-1), divergence), (logits,)
    )


@every
def test_float32_is_as_good_as_its_precision(case: str) -> None:
    _, divergence, _ = made(case)
    teacher, student = random_logprobs(16, 9, seed=7), random_logprobs(16, 9, seed=8)
    exact = divergence(teacher.float().double(), student.float().double())
    for found, expected in zip(divergence(teacher.float(), student.float()), exact, strict=True):
        assert found.dtype == torch.float32
        assert_close(found, expected, SINGLE)


# -- bounds ----------------------------------------------------------------------------------------
logprobs = st.integers(0, 2**16).flatmap(
    lambda seed: st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]).map(
        lambda scale: random_logprobs(3, 7, seed=seed, scale=scale)
    )
)


# a floor as high as -3 adds mass to the teacher, which no longer sums to one
@pytest.mark.parametrize("case", [case for case in CASES if "high floor" not in case])
@given(teacher=logprobs, student=logprobs, missing=st.integers(0, 6))
def test_a_divergence_is_never_negative(
    case: str, teacher: Tensor, student: Tensor, missing: int
) -> None:
    """Also for a teacher without mass on some categories."""
    _, divergence, _ = made(case)
    teacher = teacher.clone()
    teacher[:, 7 - missing :] = NEG_INF
    teacher = teacher.log_softmax(dim=-1)
    value, gradient = divergence(teacher, student)
    size = max(1.0, float(value.abs().max()))
    negative = "alpha_beta" in case and "-" in case
    assert float(value.min()) >= -size * (ROUNDING_OF_LARGE_TERMS if negative else ROUNDING)
    assert bool(torch.isfinite(gradient).all())


@every
def test_equal_distributions_have_no_divergence_and_no_gradient(case: str) -> None:
    config, divergence, _ = made(case)
    same = random_logprobs(6, V, seed=9)
    value, _ = divergence(same, same)
    if config.type == "taid" and config.options()["value"] == "cross_entropy":
        value = value + (same.exp() * same).sum(dim=-1)  # what is left is the entropy
    if "high floor" not in case:
        assert_close(value, torch.zeros(6))
        student = same.clone().requires_grad_()
        found = Written.apply(same, student.log_softmax(dim=-1), divergence)
        assert_close(torch.autograd.grad(found.sum(), student)[0], torch.zeros(6, V))


@pytest.mark.parametrize("case", F_DIVERGENCES)
@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_merging_tokens_never_raises_an_f_divergence(case: str, k: int) -> None:
    """The data-processing inequality: the categories give a lower bound."""
    config, divergence, schedule = made(case)
    teacher, student = random_logprobs(20, V, seed=10), random_logprobs(20, V, seed=11)
    bound, _ = divergence(merged(teacher, k), merged(student, k))
    dense = dense_divergence(config, teacher, student, schedule=schedule)
    assert bool((bound <= dense + EXACT).all())
    assert float((dense - bound).max()) > 0 or k == V - 1


@pytest.mark.parametrize("case", [*F_DIVERGENCES, "taid, kl"])
@pytest.mark.parametrize("k", [1, 5])
def test_a_tail_shaped_like_the_students_makes_the_categories_exact(case: str, k: int) -> None:
    """Then p / q is constant on the tail: value and gradient of the logits are the dense ones."""
    config, divergence, schedule = made(case)
    known = merged(random_logprobs(8, V, seed=12), k)
    random = torch.Generator().manual_seed(13)
    logits = torch.randn(8, V, generator=random, dtype=torch.float64).requires_grad_()
    student = logits.log_softmax(dim=-1)
    shape = student[:, k:].detach().log_softmax(dim=-1)
    teacher = torch.cat([known[:, :k], known[:, k:] + shape], dim=-1)
    dense = dense_divergence(config, teacher, student, schedule=schedule)
    found = Written.apply(known, merged(student, k), divergence)
    assert_close(found.detach(), dense.detach())
    (written,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(dense.sum(), logits)
    assert_close(written, expected)


# -- invariance ------------------------------------------------------------------------------------
@every
def test_the_order_of_the_stored_tokens_is_irrelevant(case: str) -> None:
    _, divergence, _ = made(case)
    teacher, student = random_logprobs(6, 8, seed=14), random_logprobs(6, 8, seed=15)
    teacher[:, 1] = teacher[:, 4]  # of equal tokens none is the first
    order = [3, 1, 6, 0, 4, 2, 5, 7]
    value, gradient = divergence(teacher, student)
    moved_value, moved_gradient = divergence(teacher[:, order], student[:, order])
    assert_close(moved_value, value)
    assert_close(moved_gradient, gradient[:, order])


@every
def test_rows_do_not_know_of_each_other(case: str) -> None:
    _, divergence, _ = made(case)
    teacher, student = random_logprobs(5, 8, seed=16), random_logprobs(5, 8, seed=17)
    value, gradient = divergence(teacher, student)
    for row in range(5):
        alone = divergence(teacher[row : row + 1], student[row : row + 1])
        assert_close(alone[0], value[row : row + 1])
        assert_close(alone[1], gradient[row : row + 1])


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unused_categories_change_nothing_and_get_no_gradient(
    case: str, dtype: torch.dtype
) -> None:
    _, divergence, _ = made(case)
    teacher, student = random_logprobs(5, 6, seed=18), random_logprobs(5, 6, seed=19)
    teacher, student = teacher.to(dtype), student.to(dtype)
    value, _ = divergence(teacher, student)
    unused = torch.full((5, 3), NEG_INF, dtype=dtype)
    padded_value, padded_gradient = divergence(
        torch.cat([teacher[:, :2], unused, teacher[:, 2:]], dim=-1),
        torch.cat([student[:, :2], unused, student[:, 2:]], dim=-1),
    )
    assert_close(padded_value, value, SINGLE if dtype == torch.float32 else EXACT)
    assert torch.equal(padded_gradient[:, 2:5], torch.zeros_like(unused))


# -- the ends of the scale -------------------------------------------------------------------------
TEACHERS = {
    "one-hot": [0.0, NEG_INF, NEG_INF, NEG_INF],
    "no tail": [math.log(0.75), math.log(0.25), NEG_INF, NEG_INF],
    "only a tail": [NEG_INF, NEG_INF, NEG_INF, 0.0],
    "tail of 1e-10": [math.log(0.75), math.log(0.25), NEG_INF, math.log(1e-10)],
    "stored form of no tail": [math.log(0.75), math.log(0.25), NEG_INF, -100.0],
    "uniform": [math.log(0.25)] * 4,
}
STUDENTS = {
    "even": [0.0, 0.0, 0.0, 0.0],
    "far off": [-40.0, -300.0, 50.0, 0.0],
    "huge": [0.0, -1e4, 0.0, -1e4],
    "without hope": [0.0, -1e18, -1e18, -1e18],
}


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_extreme_distributions_give_finite_values_and_gradients(
    case: str, dtype: torch.dtype, teacher: str
) -> None:
    _, divergence, _ = made(case)
    log_p = torch.tensor([TEACHERS[teacher]], dtype=dtype).log_softmax(dim=-1)
    for student, logits in STUDENTS.items():
        log_q = torch.tensor([logits], dtype=dtype).log_softmax(dim=-1)
        value, gradient = divergence(log_p, log_q)
        assert bool(torch.isfinite(value).all()), student
        assert bool(torch.isfinite(gradient).all()), student
        assert float(value) >= -SINGLE, student


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_divergences_are_not_lost_in_a_small_tail(case: str, dtype: torch.dtype) -> None:
    """Teacher and student agree on the stored tokens and differ tenfold in a tail of 1e-10."""
    config, divergence, schedule = made(case)
    log_p = torch.tensor([[math.log(0.75), math.log(0.25), math.log(1e-10)]], dtype=dtype)
    log_q = torch.tensor([[math.log(0.75), math.log(0.25), math.log(1e-9)]], dtype=dtype)
    value, gradient = divergence(log_p, log_q)
    exact = log_q.double().requires_grad_()
    expected = dense_divergence(config, log_p.double(), exact, schedule=schedule, has_tail=True)
    assert_close(value, expected.detach(), 1e-6)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    tail = float(slope[0, 2])
    assert float(gradient[0, 2]) == pytest.approx(tail, rel=1e-4, abs=1e-16)
