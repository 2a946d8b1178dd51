"""Alpha-beta divergence: two exponents say which tokens and which mistakes count."""

import torch
from torch import Tensor

LIMIT = 1e-6
"""An exponent nearer to 0 than this takes the limit; the general formula divides by it."""


def alpha_beta(
    teacher_MC: Tensor, student_MC: Tensor, *, alpha: float, beta: float, log_floor: float
) -> tuple[Tensor, Tensor]:
    r"""Value and gradient of the alpha-beta divergence on the k+1 categories.

    .. math:: -\frac{1}{\alpha \beta} \sum_c \left( p_c^\alpha q_c^\beta
        - \frac{\alpha}{\alpha + \beta} p_c^{\alpha + \beta}
        - \frac{\beta}{\alpha + \beta} q_c^{\alpha + \beta} \right), \quad
        \partial / \partial \log q_c = \frac{q_c^{\alpha + \beta} - p_c^\alpha q_c^\beta}{\alpha}

    and its limits where alpha, beta or their sum is 0: (1, 0) is forward KL, (0, 1) reverse KL,
    (0, 0) half the squared difference of the log-probs. Every term is at least 0. Merging tokens
    into one category never raises it where alpha + beta = 1; elsewhere it is no f-divergence and
    the tail category is one more term (``docs/losses.md``). Shapes and units:
    :class:`student_train.losses.base.Divergence`.

    Args:
        teacher_MC: Log-probs of the teacher.
        student_MC: Log-probs of the student.
        alpha: Exponent of the teacher.
        beta: Exponent of the student.
        log_floor: Log-probs below this count as this, nats, where an exponent that is not above 0
            would make a term infinite. Forward KL's own infinity stays: a student without mass
            where the teacher has some, at beta = 0 and alpha > 0.

    Source: ABKD (Wang et al., ICML 2025, arXiv 2505.04560), after Cichocki et al. 2011.
    """
    dtype = teacher_MC.dtype
    # float64: the terms cancel where p is near q, and are divided by alpha * beta
    log_p, log_q = teacher_MC.double(), student_MC.double()
    unused = torch.isneginf(log_p) & torch.isneginf(log_q)
    total = alpha + beta
    frozen = unused
    if alpha <= LIMIT or total <= LIMIT:
        log_p = log_p.clamp_min(log_floor)
    if beta < -LIMIT or total <= LIMIT:
        frozen = frozen | (log_q < log_floor)
        log_q = log_q.clamp_min(log_floor)
    terms = torch.where(unused, 0.0, _terms(log_p, log_q, alpha, beta))
    gradient = torch.where(frozen, 0.0, _gradient(log_p, log_q, alpha, beta))
    return terms.sum(dim=-1).to(dtype), gradient.to(dtype)


def _terms(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    total = alpha + beta
    if abs(alpha) < LIMIT and abs(beta) < LIMIT:
        return (log_q - log_p).square() / 2
    if abs(alpha) < LIMIT:
        return _limit(log_q, log_p, beta)
    if abs(beta) < LIMIT:
        return _limit(log_p, log_q, alpha)
    if abs(total) < LIMIT:
        log_ratio = alpha * (log_q - log_p)
        return (log_ratio + torch.expm1(-log_ratio)) / alpha**2
    mixed = (alpha * log_p + beta * log_q).exp()
    own = alpha / total * (total * log_p).exp() + beta / total * (total * log_q).exp()
    return (own - mixed) / (alpha * beta)


def _limit(first: Tensor, second: Tensor, power: float) -> Tensor:
    """The divergence where the exponent of ``second`` goes to 0; a KL at power 1."""
    own = (power * first).exp()
    gap = torch.where(own > 0, power * (first - second), 0.0)
    return (own * gap - own + (power * second).exp()) / power**2


def _gradient(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    if abs(alpha) < LIMIT:
        own = (beta * log_q).exp()
        return torch.where(own > 0, own * (log_q - log_p), 0.0)
    # 0 * -inf would be no number
    of_student = beta * log_q if abs(beta) >= LIMIT else 0.0
    both = (alpha * log_p + of_student).exp()
    return (((alpha + beta) * log_q).exp() - both) / alpha
