"""Rows of one batch that store different numbers of tokens (label kind ``mass``).

The oracle knows no padding: it takes every row alone, merges what that row does not store, and
differentiates the definition on dense logits.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from storage.columns import POWERS
from student_train.config import HybridLossConfig
from student_train.losses import DIVERGENCES, head_chunks
from student_train.losses.base import NEG_INF, PADDING_ID, TeacherRows
from student_train.losses.config import soft_config
from student_train.losses.hybrid import hybrid_loss
from student_train.losses.linear_head import LinearHead
from student_train.losses.reference import dense_divergence
from student_train.schedules import StepState
from tests.unit.student_train.fused_rows import (
    SCHEDULE,
    V,
    assert_close,
    assert_same_loss,
    fused,
    make_leaves,
    make_weights,
    only_soft,
)

SIZES = (1, 4, 2, V, 1, 7, V - 1, 3)
"""Stored tokens of every row."""
NUM_ROWS = len(SIZES)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows per product, two per sweep."""
    monkeypatch.setattr(head_chunks, "CHUNK_ROWS", 3)
    monkeypatch.setattr(head_chunks, "BLOCK_BYTES", 2 * V * 8)


def teachers() -> Tensor:
    """Dense log-probs of all rows."""
    random = torch.Generator().manual_seed(8)
    logits_MV = 2 * torch.randn(NUM_ROWS, V, generator=random, dtype=torch.float64)
    return logits_MV.log_softmax(dim=-1)


def label(teacher_MV: Tensor, sizes: Sequence[int]) -> TeacherRows:
    """Labels as the data loader makes them: as wide as the largest row, the rest unused."""
    num_rows, width = len(sizes), max(sizes)
    ordered_MV, order_MV = teacher_MV.sort(dim=-1, descending=True)
    used_MV = torch.arange(V) < torch.tensor(sizes)[:, None]
    return TeacherRows(
        hard_M=order_MV[:, 1].clone(),
        topk_ids_MK=order_MV.masked_fill(~used_MV, PADDING_ID)[:, :width],
        topk_logprobs_MK=ordered_MV.masked_fill(~used_MV, NEG_INF)[:, :width],
        log_tail_mass_M=ordered_MV.masked_fill(used_MV, NEG_INF).logsumexp(dim=-1),
        token_logprob_M=ordered_MV[:, 1],
        entropy_M=-(teacher_MV.exp() * teacher_MV).sum(dim=-1),
        log_power_sums={n: (a * teacher_MV).logsumexp(dim=-1) for n, a in POWERS.items()},
        document_M=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])[:num_rows],
        sidecar_M=torch.linspace(0, 1, num_rows, dtype=torch.float64),
    )


def merged(logprobs_V: Tensor, ids_K: Tensor) -> Tensor:
    """Log-probs of some tokens and of all others together, [1, K + 1]."""
    others_V = torch.ones(V, dtype=torch.bool)
    others_V[ids_K] = False
    rest = logprobs_V[others_V].logsumexp(0) if bool(others_V.any()) else torch.tensor(NEG_INF)
    return torch.cat([logprobs_V[ids_K], rest.to(logprobs_V).reshape(1)])[None]


def dense_soft(logits_MV: Tensor, teacher_MV: Tensor, options: dict[str, Any]) -> Tensor:
    """The soft term of every row by its definition, row by row with its own k."""
    config = soft_config(options)
    temperature = config.temperature
    assert isinstance(temperature, float)
    soft = []
    for logits_V, teacher_V, size in zip(logits_MV, teacher_MV, SIZES, strict=True):
        ids_K = teacher_V.argsort(descending=True)[:size]
        teacher = merged((teacher_V / temperature).log_softmax(dim=-1), ids_K)
        student = merged((logits_V / temperature).log_softmax(dim=-1), ids_K)
        nothing = torch.full((1, 1), NEG_INF, dtype=torch.float64)
        if config.tail != "bucket":
            teacher = torch.cat([teacher[:, :-1].log_softmax(dim=-1), nothing], dim=-1)
        if config.tail == "renorm":
            student = torch.cat([student[:, :-1].log_softmax(dim=-1), nothing], dim=-1)
        row = dense_divergence(config, teacher, student, schedule=SCHEDULE, has_tail=True)
        soft.append(row)
    return torch.cat(soft)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"tail": "renorm"}, {"tail": "zero"}),
        *({"temperature": 2.0}, {"temperature": 0.5}, {"tail": "zero", "temperature": 3.0}),
    ],
    ids=str,
)
def test_every_divergence_is_the_dense_one_of_each_rows_own_k(
    name: str, options: dict[str, Any]
) -> None:
    options = {"type": name, **options}
    teacher_MV, (hidden, weight) = teachers(), make_leaves(NUM_ROWS)
    logits_MV = hidden @ weight.t()
    soft_M, hard_M = make_weights(NUM_ROWS)
    rows = label(teacher_MV, SIZES)
    found = fused(hidden, weight, rows, soft_config(options))
    expected_M = dense_soft(logits_MV, teacher_MV, options)
    cross_entropy_M = torch.nn.functional.cross_entropy(logits_MV, rows.hard_M, reduction="none")
    assert_close(found.soft_M, expected_M.detach())
    expected = (soft_M * expected_M + hard_M * cross_entropy_M).sum()
    assert_same_loss(found.total, expected, hidden, weight)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_divergence_holds_in_the_dtypes_of_training(name: str, dtype: torch.dtype) -> None:
    teacher_MV = teachers()
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in make_leaves(NUM_ROWS)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits_MV = exact[0] @ exact[1].t()
    # the product is rounded once to the dtype of its factors before the loss sees it
    rounding = (leaves[0] @ leaves[1].t()).double() - logits_MV
    expected_M = dense_soft(logits_MV + rounding.detach(), teacher_MV, {"type": name})
    found = fused(*leaves, label(teacher_MV, SIZES), name, weights=only_soft(NUM_ROWS))
    assert_close(found.soft_M, expected_M.detach(), torch.float32)
    gradients = torch.autograd.grad(found.total, leaves)
    for one, other in zip(gradients, torch.autograd.grad(expected_M.sum(), exact), strict=True):
        assert_close(one, other, dtype)


def test_samples_of_the_tail_join_what_each_row_stores() -> None:
    teacher_MV, (hidden, weight) = teachers(), make_leaves(NUM_ROWS)
    rows = label(teacher_MV, SIZES)
    outside = torch.stack([ids_V[-4:] for ids_V in teacher_MV.argsort(descending=True)])
    has_tail = torch.tensor(SIZES)[:, None] <= V - 4
    samples = outside.masked_fill(~has_tail, PADDING_ID)
    weights = (rows.log_tail_mass_M.exp() / 4)[:, None].expand(-1, 4).masked_fill(~has_tail, 0.0)
    rows = replace(rows, tail_ids_MS=samples, tail_weights_MS=weights)
    target_MV = torch.zeros(NUM_ROWS, V, dtype=torch.float64)
    for row, size in enumerate(SIZES):
        stored = teacher_MV[row].argsort(descending=True)[:size]
        target_MV[row, stored] = teacher_MV[row, stored].exp()
        if size <= V - 4:
            target_MV[row, samples[row]] = weights[row]
    config = soft_config({"type": "forward_kl", "tail": "sampled"})
    found = fused(hidden, weight, rows, config, weights=only_soft(NUM_ROWS))
    logprobs_MV = (hidden @ weight.t()).log_softmax(dim=-1)
    entropy_M = -(teacher_MV.exp() * teacher_MV).sum(dim=-1)
    expected = -entropy_M.sum() - (target_MV * logprobs_MV).sum()
    assert_same_loss(found.total, expected, hidden, weight)


WEIGHTS: list[Any] = [
    *({"type": "static", "soft_weight": 0.3}, "confidence", {"type": "confidence", "of": "label"}),
    *("entropy", {"type": "entropy", "measure": "power_sum"}, "ambiguity", "curriculum", "wsl"),
    {"type": "sidecar", "sidecar": "0" * 32},
]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("hard_term", ["cross_entropy", "risk_guided"])
def test_a_hybrid_of_padded_rows_is_that_of_cropped_ones(weight: Any, hard_term: str) -> None:
    """Documents of one width each, one after another; none of them has an unused entry."""
    sizes = (2, 2, 2, 5, 5, V, V, V)
    teacher_MV, (hidden, embedding) = teachers(), make_leaves(NUM_ROWS)
    rows = label(teacher_MV, sizes)
    config = HybridLossConfig.model_validate({"weight": weight, "hard_term": hard_term})
    step = StepState(step=3, total_steps=20)

    def total(part: slice, rows: TeacherRows) -> Tensor:
        terms = hybrid_loss(
            hidden[part], LinearHead(embedding), rows, config, step=step, vocab_size=V
        )
        return terms.total

    apart = []
    for part in (slice(0, 3), slice(3, 5), slice(5, 8)):
        some = rows.rows(part.start, part.stop)
        size = sizes[part.start]
        cropped = replace(
            some,
            topk_ids_MK=some.topk_ids_MK[:, :size],
            topk_logprobs_MK=some.topk_logprobs_MK[:, :size],
        )
        apart.append(total(part, cropped))
    assert_same_loss(total(slice(None), rows), torch.stack(apart).sum(), hidden, embedding)


def test_a_sure_teacher_and_an_unsure_one_live_together() -> None:
    """A mass of 0.999 leaves one token of a sure row and the cap of an unsure one."""
    sure = torch.full((V,), math.log(1e-10 / (V - 1)), dtype=torch.float64)
    sure[5] = math.log1p(-1e-10)
    unsure = torch.linspace(0, 1e-3, V, dtype=torch.float64).log_softmax(dim=-1)
    teacher_MV = torch.stack([sure, unsure])
    rows = label(teacher_MV, (1, 16))
    hidden, weight = make_leaves(2)
    found = fused(hidden, weight, rows, weights=only_soft(2))
    logprobs_MV = (hidden @ weight.t()).log_softmax(dim=-1)
    expected = []
    for teacher_V, student_V, size in zip(teacher_MV, logprobs_MV, (1, 16), strict=True):
        ids_K = teacher_V.argsort(descending=True)[:size]
        p, q = merged(teacher_V, ids_K), merged(student_V, ids_K)
        expected.append((p.exp() * (p - q)).sum())
    assert_same_loss(found.total, torch.stack(expected).sum(), hidden, weight)
