"""Every loss against the formula that its authors publish, written out on dense logits.

The oracle is neither ``reference.py`` nor anything of ours: each function below is what a paper or
a release says, on full softmaxes, with gradients from autograd and stopped where theirs are. Labels
store every token (K = V), so nothing is left to the tail; the fused pass starts from hidden states
and an output embedding.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from student_train.config import HybridLossConfig
from student_train.losses.base import PADDING_ID, FixedWeights, LossTerms, TeacherRows
from student_train.losses.config import soft_config
from student_train.losses.fused_linear import fused_linear_loss
from student_train.losses.hybrid import hybrid_loss
from student_train.losses.linear_head import LinearHead
from student_train.losses.soft_term import make_divergence
from student_train.schedules import StepState

EXACT = 1e-9
"""float64; absolute, and relative where values are larger than 1."""

V, H, NUM_ROWS = 19, 7, 8
T = 0.3
"""TAID's interpolation parameter."""

Published = Callable[[Tensor, Tensor], Tensor]
"""Logits of student and teacher, [N, V] each, to a value of every row."""


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(dim=-1)


def entropy(log_a: Tensor) -> Tensor:
    return -(log_a.exp() * log_a).sum(dim=-1)


# -- the papers and releases ----------------------------------------------------------------------
def hinton(z: Tensor, u: Tensor) -> Tensor:
    return kl(u.log_softmax(-1), z.log_softmax(-1))


def minillm_single_step(z: Tensor, u: Tensor) -> Tensor:
    """The regulariser of MiniLLM: cross-entropy of the student's own draws minus its entropy."""
    q = z.softmax(-1)
    return -(q * u.log_softmax(-1)).sum(-1) - -(q * z.log_softmax(-1)).sum(-1)


def trl_jsd(beta: float) -> Published:
    def loss(z: Tensor, u: Tensor) -> Tensor:
        student, teacher = z.log_softmax(-1), u.log_softmax(-1)
        if beta == 0:
            elements = functional.kl_div(student, teacher, reduction="none", log_target=True)
        elif beta == 1:
            elements = functional.kl_div(teacher, student, reduction="none", log_target=True)
        else:
            weight = torch.tensor(beta, dtype=z.dtype)
            parts = [student + torch.log(1 - weight), teacher + torch.log(weight)]
            mixture = torch.logsumexp(torch.stack(parts), dim=0)
            of_teacher = functional.kl_div(mixture, teacher, reduction="none", log_target=True)
            of_student = functional.kl_div(mixture, student, reduction="none", log_target=True)
            elements = weight * of_teacher + (1 - weight) * of_student
        return elements.sum(-1)

    return loss


def distillm_forward(skew: float) -> Published:
    """The release returns the cross-entropy part; the teacher's entropy is no function of z."""

    def loss(z: Tensor, u: Tensor) -> Tensor:
        p, q = u.softmax(-1), z.softmax(-1)
        return -(p * torch.log(skew * p + (1 - skew) * q)).sum(-1) - entropy(u.log_softmax(-1))

    return loss


def distillm_reverse(skew: float) -> Published:
    def loss(z: Tensor, u: Tensor) -> Tensor:
        p, q = u.softmax(-1), z.softmax(-1)
        mixed = torch.log((1 - skew) * p + skew * q)
        return -(q * mixed - q * z.log_softmax(-1)).sum(-1)

    return loss


def total_variation(z: Tensor, u: Tensor) -> Tensor:
    return 0.5 * (u.softmax(-1) - z.softmax(-1)).abs().sum(-1)


def wu_adaptive(mu: float, *, reach: bool) -> Published:
    """Head and tail by the sorted probabilities of the teacher; weights without gradient."""

    def loss(z: Tensor, u: Tensor) -> Tensor:
        log_p, log_q = u.log_softmax(-1), z.log_softmax(-1)
        ordered, order = log_p.exp().sort(dim=-1, descending=True)
        gap = (ordered - log_q.detach().exp().gather(-1, order)).abs()
        before = ordered.cumsum(-1) - ordered
        outside = before >= mu if reach else ordered.cumsum(-1) > mu
        outside[:, 0] = False
        head, rest = gap.masked_fill(outside, 0).sum(-1), gap.masked_fill(~outside, 0).sum(-1)
        return head / (head + rest) * kl(log_p, log_q) + rest / (head + rest) * kl(log_q, log_p)

    return loss


def bridge_garden_adaptive(mu: float) -> Published:
    def loss(z: Tensor, u: Tensor) -> Tensor:
        log_p, log_q = u.log_softmax(-1), z.log_softmax(-1)
        of_p, of_q = torch.exp(-mu * entropy(log_p)), torch.exp(-mu * entropy(log_q))
        share = of_p / (of_p + of_q)
        return share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)

    return loss


def abkd(a: float, b: float) -> Published:
    def loss(z: Tensor, u: Tensor) -> Tensor:
        log_p, log_q = u.log_softmax(-1), z.log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        if a == 0 and b == 0:
            terms = 0.5 * (log_q - log_p) ** 2
        elif a == 0:
            terms = (q**b * (b * (log_q - log_p) - 1) + p**b) / b**2
        elif b == 0:
            terms = (p**a * (a * (log_p - log_q) - 1) + q**a) / a**2
        elif a + b == 0:
            terms = (a * (log_q - log_p) + (q / p) ** -a - 1) / a**2
        else:
            own = a / (a + b) * p ** (a + b) + b / (a + b) * q ** (a + b)
            terms = -(p**a * q**b - own) / (a * b)
        return terms.sum(-1)

    return loss


def taid(z: Tensor, u: Tensor) -> Tensor:
    """Interpolated logits, the student's among them held fixed; cross-entropy as in the release."""
    target = ((1 - T) * z.detach() + T * u).softmax(-1)
    return -(target * z.log_softmax(-1)).sum(-1)


def taid_of_the_paper(z: Tensor, u: Tensor) -> Tensor:
    mixed = ((1 - T) * z.detach() + T * u).log_softmax(-1)
    return kl(mixed, z.log_softmax(-1))


AB_EXPONENTS = [
    *((0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0), (0.6, 0.0), (0.0, 0.4)),
    *((0.5, -0.5), (-0.3, 0.3), (1.2, -0.4), (-0.4, 0.9), (1.0, 1.0), (2.0, -1.0)),
]
CASES: dict[str, tuple[dict[str, Any], Published]] = {
    "forward KL": ({"type": "forward_kl"}, hinton),
    "MiniLLM": ({"type": "reverse_kl"}, minillm_single_step),
    "TVD": ({"type": "tvd"}, total_variation),
    "TAID": ({"type": "taid"}, taid),
    "TAID, paper": ({"type": "taid", "value": "kl"}, taid_of_the_paper),
}
CASES |= {
    f"JSD {beta:g}": ({"type": "jsd", "beta": beta}, trl_jsd(beta))
    for beta in (0.0, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0)
}
CASES |= {
    f"DistiLLM forward {skew:g}": (
        {"type": "skew_forward_kl", "skew": skew},
        distillm_forward(skew),
    )
    for skew in (0.0, 0.1, 0.5)
}
CASES |= {
    f"DistiLLM reverse {skew:g}": (
        {"type": "skew_reverse_kl", "skew": skew},
        distillm_reverse(skew),
    )
    for skew in (0.1, 0.5)
}
CASES |= {
    f"AKL {mu:g} {head}": (
        {"type": "adaptive_kl", "head_mass": mu, "head": head},
        wu_adaptive(mu, reach=head == "reach"),
    )
    for mu, head in product((0.3, 0.5, 0.9), ("reach", "within"))
}
CASES |= {
    f"AKL by entropies {mu:g}": (
        {"type": "entropy_adaptive_kl", "sharpness": mu},
        bridge_garden_adaptive(mu),
    )
    for mu in (0.0, 0.5, 2.0)
}
CASES |= {
    f"ABKD {a:g} {b:g}": ({"type": "alpha_beta", "alpha": a, "beta": b}, abkd(a, b))
    for a, b in AB_EXPONENTS
}


# -- ours -----------------------------------------------------------------------------------------
def logits_of_teacher(scale: float, *, rows: int = NUM_ROWS) -> Tensor:
    random = torch.Generator().manual_seed(int(10 * scale))
    return scale * torch.randn(rows, V, generator=random, dtype=torch.float64)


def leaves(scale: float = 1.0, *, rows: int = NUM_ROWS) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(77)
    hidden = scale * torch.randn(rows, H, generator=random, dtype=torch.float64)
    weight = torch.randn(V, H, generator=random, dtype=torch.float64)
    return hidden.requires_grad_(), weight.requires_grad_()


def everything_stored(u: Tensor) -> TeacherRows:
    """Labels of all tokens; the store's form of "no tail", which the loader reads as -inf."""
    ordered, ids = u.log_softmax(-1).sort(dim=-1, descending=True)
    log_p = u.log_softmax(-1)
    return TeacherRows(
        hard_M=ids[:, 2].clone(),
        topk_ids_MK=ids,
        topk_logprobs_MK=ordered,
        log_tail_mass_M=torch.full((len(u),), -torch.inf, dtype=torch.float64),
        token_logprob_M=ordered[:, 2],
        entropy_M=entropy(log_p),
        log_power_sums={
            name: (alpha * log_p).logsumexp(-1)
            for name, alpha in (("10", 0.1), ("25", 0.25), ("50", 0.5), ("75", 0.75))
        },
        document_M=torch.tensor([0, 0, 0, 0, 1, 2, 2, 2])[: len(u)],
        sidecar_M=torch.linspace(0.1, 0.8, len(u), dtype=torch.float64),
    )


def soft_terms(
    inputs: tuple[Tensor, Tensor], rows: TeacherRows, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Value of every row, and their sum with gradient."""
    hidden, weight = inputs
    terms = fused_linear_loss(
        hidden,
        LinearHead(weight),
        rows,
        divergence=make_divergence(soft_config(options), schedule={"t": T}),
        weights=FixedWeights(torch.ones(len(rows)).double(), torch.zeros(len(rows)).double()),
        vocab_size=V,
    )
    return terms.soft_M, terms.total


def assert_close(found: Tensor, expected: Tensor) -> None:
    atol = EXACT * max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=atol)


def assert_same_gradients(one: Tensor, other: Tensor, inputs: tuple[Tensor, ...]) -> None:
    pairs = (torch.autograd.grad(total, inputs, retain_graph=True) for total in (one, other))
    for found, expected in zip(*pairs, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("teacher_scale", "student_scale"), [(0.3, 1.0), (2.0, 1.0), (5.0, 2.0)])
def test_value_and_gradients_are_the_published_ones(
    case: str, teacher_scale: float, student_scale: float
) -> None:
    options, published = CASES[case]
    u, inputs = logits_of_teacher(teacher_scale), leaves(student_scale)
    if options["type"] == "alpha_beta":
        options = {**options, "log_floor": -1000.0}  # the formula itself has no floor
    elif "log_floor" in soft_config(options).options():
        options = {**options, "log_floor": -700.0}
    found_M, total = soft_terms(inputs, everything_stored(u), options)
    expected_M = published(inputs[0] @ inputs[1].t(), u)
    assert_close(found_M, expected_M)
    assert_same_gradients(total, expected_M.sum(), inputs)


@pytest.mark.parametrize("case", CASES)
def test_a_default_floor_is_out_of_the_way_of_ordinary_teachers(case: str) -> None:
    options, published = CASES[case]
    u, inputs = logits_of_teacher(2.0), leaves()
    found_M, total = soft_terms(inputs, everything_stored(u), options)
    expected_M = published(inputs[0] @ inputs[1].t(), u)
    assert_close(found_M, expected_M)
    assert_same_gradients(total, expected_M.sum(), inputs)


# -- samples --------------------------------------------------------------------------------------
def test_the_mean_over_all_counts_is_the_dense_forward_kl() -> None:
    """RS-KD with two draws: all V * V outcomes, weighted by their probability."""
    u, (hidden, weight) = logits_of_teacher(2.0, rows=1), leaves(rows=1)
    rows = everything_stored(u)
    p_V = u.softmax(-1)[0]
    value, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(weight)
    for first, second in product(range(V), repeat=2):
        same = first == second
        counted = replace(
            rows,
            tail_ids_MS=torch.tensor([[first, PADDING_ID if same else second]]),
            tail_weights_MS=torch.tensor([[1.0, 0.0] if same else [0.5, 0.5]]).double(),
            samples_cover_all=True,
        )
        options = {"type": "forward_kl", "tail": "sampled"}
        found_M, total = soft_terms((hidden, weight), counted, options)
        probability = p_V[first] * p_V[second]
        value = value + probability * found_M.sum()
        gradient = gradient + probability * torch.autograd.grad(total, weight)[0]
    expected = hinton(hidden @ weight.t(), u).sum()
    assert_close(value, expected)
    assert_close(gradient, torch.autograd.grad(expected, weight)[0])


# -- Bridge-Garden --------------------------------------------------------------------------------
STEP = StepState(step=3, total_steps=40)


def release_weights(policy: str, z: Tensor, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Soft and hard weights of the release and of the paper, by their names there."""
    p = u.softmax(-1)
    p_y = p.gather(-1, y[:, None]).squeeze(-1)
    largest = p.max(dim=-1).values
    power = (p**0.1).sum(-1)
    smoothness = ((power - 1) / (V**0.9 - 1)).clamp(0, 1)
    ramp = min(STEP.step / (0.2 * STEP.total_steps), 1.0)
    ratio = (z.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1) / p_y.log()).clamp(-10, 10)
    ratio = ratio.detach()
    ones = torch.ones_like(p_y)
    soft = {
        "static": 0.2 * ones,
        "paper confidence": 1 - largest,
        "reverse paper confidence": largest,
        "adap_sft": 1 - p_y,
        "reverse_adap_sft": p_y,
        "paper entropy": entropy(u.log_softmax(-1)) / math.log(V),
        "entropy_sft_distill": smoothness,
        "entropy_sft_sft": 1 - smoothness,
        "hybrid_kd": 0.5 * (1 - largest) / (1 - 1 / V),
        "curriculum_weight": 0.2 * ramp * ones,
        "reverse_curriculum_weight": (1 - (1 - 0.2) * ramp) * ones,
        "wsl": 0.2 * (1 - torch.exp(-ratio)).clamp(0, 1),
        "reverse_wsl": 0.2 * torch.exp(-ratio),
    }[policy]
    return soft, ones if "wsl" in policy else 1 - soft


POLICIES: dict[str, Any] = {
    "static": {"soft_weight": 0.2},
    "paper confidence": "confidence",
    "reverse paper confidence": {"type": "confidence", "reverse": True},
    "adap_sft": {"type": "confidence", "of": "label"},
    "reverse_adap_sft": {"type": "confidence", "of": "label", "reverse": True},
    "paper entropy": "entropy",
    "entropy_sft_distill": {"type": "entropy", "measure": "power_sum"},
    "entropy_sft_sft": {"type": "entropy", "measure": "power_sum", "reverse": True},
    "hybrid_kd": "ambiguity",
    "curriculum_weight": "curriculum",
    "reverse_curriculum_weight": {"type": "curriculum", "reverse": True},
    "wsl": "wsl",
    "reverse_wsl": {"type": "wsl", "reverse": True},
}


def hybrid(inputs: tuple[Tensor, Tensor], rows: TeacherRows, **options: Any) -> LossTerms:
    config = HybridLossConfig.model_validate(options)
    return hybrid_loss(inputs[0], LinearHead(inputs[1]), rows, config, step=STEP, vocab_size=V)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", ["forward KL", "JSD 0.1", "ABKD 0.2 0.7"])
def test_a_hybrid_is_that_of_the_release_with_one_normaliser(policy: str, case: str) -> None:
    options, published = CASES[case]
    u, inputs = logits_of_teacher(2.0), leaves()
    rows, z = everything_stored(u), inputs[0] @ inputs[1].t()
    soft_M, hard_M = release_weights(policy, z, u, rows.hard_M)
    cross_entropy_M = functional.cross_entropy(z, rows.hard_M, reduction="none")
    expected = (hard_M * cross_entropy_M + soft_M * published(z, u)).sum()
    found = hybrid(inputs, rows, soft=options, weight=POLICIES[policy])
    assert_close(found.soft_weight_M, soft_M)
    assert_close(found.total, expected)
    assert_same_gradients(found.total, expected, inputs)


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_a_temperature_is_that_of_the_release_with_its_square(temperature: float) -> None:
    u, inputs = logits_of_teacher(2.0), leaves()
    rows, z = everything_stored(u), inputs[0] @ inputs[1].t()
    soft = {"type": "forward_kl", "temperature": temperature, "temperature_squared": True}
    found = hybrid(inputs, rows, soft=soft, weight={"soft_weight": 0.2})
    cross_entropy = functional.cross_entropy(z, rows.hard_M, reduction="sum")
    softened = hinton(z / temperature, u / temperature).sum()
    expected = 0.8 * cross_entropy + 0.2 * temperature**2 * softened
    assert_close(found.total, expected)
    assert_same_gradients(found.total, expected, inputs)


def test_the_entropy_regulariser_is_that_of_the_release() -> None:
    u, inputs = logits_of_teacher(2.0), leaves()
    rows, z = everything_stored(u), inputs[0] @ inputs[1].t()
    found = hybrid(inputs, rows, weight={"soft_weight": 0.2}, student_entropy=0.1)
    cross_entropy = functional.cross_entropy(z, rows.hard_M, reduction="sum")
    own = entropy(z.log_softmax(-1)).sum()
    expected = 0.8 * cross_entropy + 0.2 * hinton(z, u).sum() - 0.1 * own
    assert_close(found.total, expected)
    assert_same_gradients(found.total, expected, inputs)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.05, 0.9999), (0.1, 1.0), (1.0, 0.7)])
def test_the_risk_guided_term_is_that_of_the_release(alpha: float, gamma: float) -> None:
    """Values of states are log-sum-exps, the next one 0 behind the end of a document."""
    u, inputs = logits_of_teacher(2.0), leaves()
    rows, z = everything_stored(u), inputs[0] @ inputs[1].t()
    risk = torch.zeros((), dtype=torch.float64)
    for start, stop in ((0, 4), (4, 5), (5, 8)):
        value = z[start:stop].logsumexp(-1)
        score = z[start:stop].gather(-1, rows.hard_M[start:stop, None]).squeeze(-1)
        following = torch.cat([value[1:], torch.zeros(1, dtype=torch.float64)])
        length = stop - start
        discount = gamma ** torch.arange(length, dtype=torch.float64)
        penalty = alpha / 4 * (score - gamma * following) ** 2
        risk = risk + (discount * (value - score + penalty)).sum()
        # a mean over sequences there; weighted by their lengths for the one normaliser here
        risk = risk + length * gamma**length * alpha * (1 - gamma) / 4 * value[-1] ** 2
    expected = 0.8 * risk + 0.2 * hinton(z, u).sum()
    term = {"type": "risk_guided", "alpha": alpha, "gamma": gamma}
    found = hybrid(inputs, rows, weight={"soft_weight": 0.2}, hard_term=term)
    assert_close(found.total, expected)
    assert_same_gradients(found.total, expected, inputs)
