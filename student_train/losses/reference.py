"""The slow, obvious form of every loss: dense logits and autograd. The oracle of the tests.

Nothing here is shared with the fast path except how stored labels are read: every divergence is
written a second time, from its definition, on probabilities, without a gradient of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from student_train.losses.base import NEG_INF, PADDING_ID, TeacherRows
from student_train.losses.config import DivergenceConfig, LinearTemperature, soft_config
from student_train.losses.temperature import teacher_categories_at

Schedule = Mapping[str, float]


def dense_divergence(
    divergence: str | DivergenceConfig,
    teacher_NX: Tensor,
    student_NX: Tensor,
    *,
    schedule: Schedule | None = None,
    has_tail: bool = False,
) -> Tensor:
    """A divergence of two distributions over any outcomes, by its definition.

    Args:
        divergence: Name or options; its tail treatment and temperature are not looked at.
        teacher_NX: float[N, X], log-probs of the teacher; -inf is allowed.
        student_NX: float[N, X], log-probs of the student; -inf is allowed.
        schedule: As for ``make_divergence``.
        has_tail: Whether the last outcome stands for all other tokens. Then adaptive KL never
            counts it to the head.

    Returns:
        float[N], differentiable with respect to ``student_NX``.
    """
    config = _config(divergence)
    if not has_tail:
        nothing = torch.full_like(teacher_NX[:, :1], NEG_INF)
        teacher_NX = torch.cat([teacher_NX, nothing], dim=-1)
        student_NX = torch.cat([student_NX, nothing.to(student_NX)], dim=-1)
    return FORMULAS[config.type](teacher_NX, student_NX, config, schedule or {})


def reference_loss(
    logits_MV: Tensor,
    rows: TeacherRows,
    *,
    divergence: str | DivergenceConfig,
    soft_weight_M: Tensor,
    hard_weight_M: Tensor,
    schedule: Schedule | None = None,
) -> Tensor:
    """Sum over rows of ``soft_weight * divergence + hard_weight * cross_entropy``, in nats."""
    soft_M = reference_soft(logits_MV, rows, divergence=divergence, schedule=schedule)
    hard_M = torch.nn.functional.cross_entropy(logits_MV, rows.hard_M, reduction="none")
    return (soft_weight_M * soft_M + hard_weight_M * hard_M).sum()


def reference_soft(
    logits_MV: Tensor,
    rows: TeacherRows,
    *,
    divergence: str | DivergenceConfig,
    schedule: Schedule | None = None,
) -> Tensor:
    """The soft term of every row, float[M], with its tail treatment and temperature."""
    config, steps = _config(divergence), schedule or {}
    temperature = config.temperature
    if isinstance(temperature, LinearTemperature):
        temperature = temperature.at(steps["progress"])
    scale = temperature**2 if config.temperature_squared else 1.0
    if config.tail == "sampled":
        return _sampled(logits_MV, rows)
    student_MC = student_categories(logits_MV / temperature, rows)
    if config.tail == "bucket":
        teacher_MC = teacher_categories_at(rows, temperature, logits_MV.dtype)
    else:
        # softmax over the stored tokens only, and no tail
        stored_MK = (rows.stored(logits_MV.dtype) / temperature).log_softmax(dim=-1)
        teacher_MC = torch.cat([stored_MK, torch.full_like(stored_MK[:, :1], NEG_INF)], dim=-1)
    if config.tail == "renorm":
        stored_MK = student_MC[:, :-1].log_softmax(dim=-1)
        student_MC = torch.cat([stored_MK, torch.full_like(stored_MK[:, :1], NEG_INF)], dim=-1)
    return scale * dense_divergence(config, teacher_MC, student_MC, schedule=steps, has_tail=True)


def student_categories(logits_MV: Tensor, rows: TeacherRows) -> Tensor:
    """Log-probs of the student's k+1 categories, [M, C], by a full softmax and a masked sum."""
    logprobs_MV = logits_MV.log_softmax(dim=-1)
    out = []
    for logprobs_V, ids_K in zip(logprobs_MV, rows.topk_ids_MK, strict=True):
        used = ids_K != PADDING_ID
        rest = torch.ones_like(logprobs_V, dtype=torch.bool)
        rest[ids_K[used]] = False
        stored = torch.full_like(ids_K, NEG_INF, dtype=logprobs_V.dtype)
        stored = stored.masked_scatter(used, logprobs_V[ids_K[used]])
        tail = logprobs_V[rest].logsumexp(dim=0) if bool(rest.any()) else torch.tensor(NEG_INF)
        out.append(torch.cat([stored, tail.to(stored).reshape(1)]))
    return torch.stack(out) if out else logits_MV.new_zeros(0, rows.topk_ids_MK.shape[1] + 1)


def _sampled(logits_MV: Tensor, rows: TeacherRows) -> Tensor:
    """Cross-entropy to one dense estimate of the teacher, plus the estimate's constant."""
    assert rows.tail_ids_MS is not None
    assert rows.tail_weights_MS is not None
    logprobs_MV = logits_MV.log_softmax(dim=-1)
    target_MV = torch.zeros_like(logprobs_MV)
    constant_M = torch.zeros_like(logprobs_MV[:, 0])
    teacher_MK = rows.categories(logits_MV.dtype)[:, :-1]
    for row in range(len(rows)):
        known = 0.0
        if not rows.samples_cover_all:
            used = rows.topk_ids_MK[row] != PADDING_ID
            log_p = teacher_MK[row][used]
            target_MV[row, rows.topk_ids_MK[row][used]] = log_p.exp()
            known = float((log_p.exp() * _safe(log_p)).sum())
        used = rows.tail_ids_MS[row] != PADDING_ID
        weights = rows.tail_weights_MS[row][used].to(target_MV.dtype)
        target_MV[row].index_add_(0, rows.tail_ids_MS[row][used], weights)
        # all of sum p log p where the entropy is stored, else what the stored tokens have of it
        constant_M[row] = known if rows.entropy_M is None else -rows.entropy_M[row].double()
    return constant_M - (target_MV * logprobs_MV).sum(dim=-1)


def _config(divergence: str | DivergenceConfig) -> DivergenceConfig:
    return divergence if isinstance(divergence, DivergenceConfig) else soft_config(divergence)


# -- definitions -----------------------------------------------------------------------------------
# (log p, log q, config, schedule) -> [N]; p is the teacher, the last outcome the tail. Terms with
# p = 0 or q = 0 are taken at their limit.
def _safe(logprobs: Tensor) -> Tensor:
    """Log-probs with 0 for -inf, so that 0 * log 0 is 0, in the gradient too."""
    return torch.where(torch.isneginf(logprobs), 0.0, logprobs)


def _mass(logprobs: Tensor) -> Tensor:
    return torch.where(torch.isneginf(logprobs), 0.0, _safe(logprobs).exp())


def _power(logprobs: Tensor, exponent: float) -> Tensor:
    """A power of the probabilities; 0 of none, without the infinite slope of a power there."""
    return torch.where(torch.isneginf(logprobs), 0.0, (exponent * _safe(logprobs)).exp())


def _log(mass: Tensor) -> Tensor:
    return torch.where(mass > 0, mass, 1.0).log()


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Sum of ``p log (p / q)`` of two masses."""
    return (p * (_log(p) - _log(q))).sum(dim=-1)


def _forward(log_p: Tensor, log_q: Tensor, *_: Any) -> Tensor:
    return (_mass(log_p) * (_safe(log_p) - _safe(log_q))).sum(dim=-1)


def _reverse(log_p: Tensor, log_q: Tensor, config: Any, _: Schedule) -> Tensor:
    return (_mass(log_q) * (_safe(log_q) - log_p.clamp_min(config.log_floor))).sum(dim=-1)


def _jsd(log_p: Tensor, log_q: Tensor, config: Any, schedule: Schedule) -> Tensor:
    beta: float = config.beta
    if beta in (0, 1):
        return _reverse(log_p, log_q, config, schedule) if beta else _forward(log_p, log_q)
    p, q = _mass(log_p), _mass(log_q)
    mixture = beta * p + (1 - beta) * q
    return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


def _skew_forward(log_p: Tensor, log_q: Tensor, config: Any, _: Schedule) -> Tensor:
    p, q = _mass(log_p), _mass(log_q)
    return _kl(p, config.skew * p + (1 - config.skew) * q)


def _skew_reverse(log_p: Tensor, log_q: Tensor, config: Any, _: Schedule) -> Tensor:
    p, q = _mass(log_p), _mass(log_q)
    return _kl(q, (1 - config.skew) * p + config.skew * q)


def _tvd(log_p: Tensor, log_q: Tensor, *_: Any) -> Tensor:
    return (_mass(log_p) - _mass(log_q)).abs().sum(dim=-1) / 2


def _adaptive(log_p: Tensor, log_q: Tensor, config: Any, schedule: Schedule) -> Tensor:
    p, q = _mass(log_p), _mass(log_q)
    distance = (p - q).abs() if config.through_weights else (p - q).abs().detach()
    head = torch.zeros_like(p, dtype=torch.bool)
    for row in range(len(p)):
        # the last outcome is the tail
        for outcome in range(p.shape[1] - 1):
            stored = p[row, :-1]
            if config.head == "reach":
                chosen = stored[stored > p[row, outcome]].sum() < config.head_mass
            else:
                chosen = stored[stored >= p[row, outcome]].sum() <= config.head_mass
                chosen |= p[row, outcome] == stored.max()
            head[row, outcome] = bool(chosen) and bool(p[row, outcome] > 0)
    total = distance.sum(dim=-1)
    weight = torch.where(total > 0, (distance * head).sum(dim=-1), 1.0) / torch.where(
        total > 0, total, 1.0
    )
    forward = _forward(log_p, log_q)
    return weight * forward + (1 - weight) * _reverse(log_p, log_q, config, schedule)


def _entropy_adaptive(log_p: Tensor, log_q: Tensor, config: Any, schedule: Schedule) -> Tensor:
    entropies = [-(_mass(x) * _safe(x)).sum(dim=-1) for x in (log_p, log_q)]
    if not config.through_weights:
        entropies = [entropy.detach() for entropy in entropies]
    of_p, of_q = [(-config.sharpness * entropy).exp() for entropy in entropies]
    weight: Tensor = of_p / (of_p + of_q)
    forward = _forward(log_p, log_q)
    return weight * forward + (1 - weight) * _reverse(log_p, log_q, config, schedule)


def _alpha_beta(log_p: Tensor, log_q: Tensor, config: Any, _: Schedule) -> Tensor:
    a, b = config.alpha, config.beta
    # outcomes that neither has, and those that only a floor keeps finite
    absent = torch.isneginf(log_p) & torch.isneginf(log_q)
    p_floor = config.log_floor if a <= 0 or a + b <= 0 else NEG_INF
    q_floor = config.log_floor if b < 0 or a + b <= 0 else NEG_INF
    log_p, log_q = log_p.clamp_min(p_floor), log_q.clamp_min(q_floor)
    p_a, q_b = _power(log_p, a), _power(log_q, b)
    if a == 0 and b == 0:
        terms = (log_q - log_p) ** 2 / 2
    elif a == 0:
        terms = (q_b * (b * (_safe(log_q) - log_p)) - q_b + _power(log_p, b)) / b**2
    elif b == 0:
        terms = (p_a * (a * (_safe(log_p) - log_q)) - p_a + _power(log_q, a)) / a**2
    elif a + b == 0:
        terms = (a * (log_q - log_p) + (a * (log_p - log_q)).exp() - 1) / a**2
    else:
        p_ab, q_ab = _power(log_p, a + b), _power(log_q, a + b)
        terms = -(p_a * q_b - a / (a + b) * p_ab - b / (a + b) * q_ab) / (a * b)
    return torch.where(absent, 0.0, terms).sum(dim=-1)


def _taid(log_p: Tensor, log_q: Tensor, config: Any, schedule: Schedule) -> Tensor:
    t, q = schedule["t"], _mass(log_q).detach()
    target = q ** (1 - t) * log_p.clamp_min(config.log_floor).exp() ** t * (q > 0)
    target = target / target.sum(dim=-1, keepdim=True)
    cross_entropy = -(target * _safe(log_q)).sum(dim=-1)
    if config.value == "kl":
        return cross_entropy + (target * _log(target)).sum(dim=-1)
    return cross_entropy


FORMULAS: dict[str, Callable[[Tensor, Tensor, Any, Schedule], Tensor]] = {
    "forward_kl": _forward,
    "reverse_kl": _reverse,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward,
    "skew_reverse_kl": _skew_reverse,
    "tvd": _tvd,
    "adaptive_kl": _adaptive,
    "entropy_adaptive_kl": _entropy_adaptive,
    "alpha_beta": _alpha_beta,
    "taid": _taid,
}
"""Every divergence of ``DIVERGENCES`` by its name."""
