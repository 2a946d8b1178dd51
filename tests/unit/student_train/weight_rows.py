"""Labels of whole distributions, and a policy's weights for them."""

from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from storage.columns import POWERS
from student_train.losses.base import TeacherRows, load
from student_train.schedules import StepState
from student_train.weights import WEIGHT_POLICIES
from student_train.weights.base import TokenWeights, WeightContext
from student_train.weights.config import WeightConfig, WeightPolicyConfig

V = 30
EXACT = 1e-12
"""Absolute, float64: a few roundings of numbers of size one."""

ONE_HOT = torch.eye(V, dtype=torch.float64)[:1]
UNIFORM = torch.full((1, V), 1 / V, dtype=torch.float64)


def random_teachers(num_rows: int, *, seed: int = 0, scale: float = 2.0) -> Tensor:
    """Probabilities of a random teacher, float64[M, V]."""
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_rows, V, generator=random, dtype=torch.float64)
    return logits.softmax(dim=-1)


def rows_of(p_MV: Tensor, *, k: int = 5, hard_M: Tensor | None = None) -> TeacherRows:
    """Labels of whole distributions with every optional column."""
    logprobs = p_MV.log().clamp_min(-100.0)  # what the store makes of no probability
    top, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    tail = p_MV.gather(-1, ids)[:, k:].sum(dim=-1)
    hard = ids[:, 1] if hard_M is None else hard_M
    return TeacherRows(
        hard_M=hard,
        topk_ids_MK=ids[:, :k],
        topk_logprobs_MK=top[:, :k],
        log_tail_mass_M=tail.log(),
        token_logprob_M=logprobs.gather(-1, hard.unsqueeze(-1)).squeeze(-1),
        entropy_M=-torch.xlogy(p_MV, p_MV).sum(dim=-1),
        log_power_sums={name: (p_MV**alpha).sum(dim=-1).log() for name, alpha in POWERS.items()},
        sidecar_M=torch.linspace(0, 1, len(p_MV), dtype=torch.float64),
    )


def config_of(name: str, **options: Any) -> WeightPolicyConfig:
    config: WeightPolicyConfig = TypeAdapter(WeightConfig).validate_python(
        {"type": name, **({"sidecar": "a" * 32} if name == "sidecar" else {}), **options}
    )
    return config


def weigh(
    rows: TeacherRows,
    name: str,
    *,
    step: int = 0,
    total_steps: int = 10,
    student_logprob_M: Tensor | None = None,
    vocab_size: int = V,
    **options: Any,
) -> TokenWeights:
    if student_logprob_M is None:
        student_logprob_M = torch.full_like(rows.log_tail_mass_M, -2.0)
    context = WeightContext(
        vocab_size, StepState(step, total_steps), rows.token_logprob_M, student_logprob_M
    )
    policy = load(WEIGHT_POLICIES[name])
    found = policy(rows, config_of(name, **options), context)  # type: ignore[operator]
    assert isinstance(found, TokenWeights)
    return found


def assert_equal(found_M: Tensor, expected_M: Tensor | list[float]) -> None:
    torch.testing.assert_close(
        found_M, torch.as_tensor(expected_M, dtype=found_M.dtype), rtol=0, atol=EXACT
    )


def assert_blend(found: TokenWeights, soft_M: Tensor | list[float]) -> None:
    assert_equal(found.soft_M, soft_M)
    assert_equal(found.soft_M + found.hard_M, torch.ones_like(found.soft_M))
