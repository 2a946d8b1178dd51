"""What is said of student and teacher beside the loss, against dense logits."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from student_train.losses.base import NEG_INF, PADDING_ID, FixedWeights, TeacherRows
from student_train.losses.forward_kl import forward_kl
from student_train.losses.fused_linear import FusedTerms, fused_linear_loss
from student_train.losses.linear_head import LinearHead
from student_train.losses.measures import (
    HELD_OUT_MEASURES,
    STEP_MEASURES,
    held_out_terms,
    step_measures,
)

NUM_ROWS, VOCAB_SIZE, HIDDEN, K = 700, 50, 8, 5
SOFTCAP = 3.0


@pytest.fixture(params=[None, SOFTCAP], ids=["plain", "softcap"])
def head(request: pytest.FixtureRequest) -> LinearHead:
    torch.manual_seed(1)
    weight_VH = torch.randn(VOCAB_SIZE, HIDDEN, dtype=torch.float64)
    return LinearHead(weight_VH=weight_VH, softcap=request.param)


@pytest.fixture
def hidden_MH() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(NUM_ROWS, HIDDEN, dtype=torch.float64)


@pytest.fixture
def dense_teacher_MV() -> Tensor:
    torch.manual_seed(3)
    return (2 * torch.randn(NUM_ROWS, VOCAB_SIZE, dtype=torch.float64)).log_softmax(dim=-1)


@pytest.fixture
def rows(dense_teacher_MV: Tensor) -> TeacherRows:
    """Top-k of a dense teacher; every third row stores only its three likeliest tokens."""
    top = dense_teacher_MV.topk(K, dim=-1)
    ids_MK, logprobs_MK = top.indices.clone(), top.values.clone()
    ids_MK[::3, 3:], logprobs_MK[::3, 3:] = PADDING_ID, NEG_INF
    tail_M = (1 - logprobs_MK.exp().sum(dim=-1)).log()
    entropy_M = -(dense_teacher_MV.exp() * dense_teacher_MV).sum(dim=-1)
    return TeacherRows(
        hard_M=ids_MK[:, 1].clone(),
        topk_ids_MK=ids_MK,
        topk_logprobs_MK=logprobs_MK,
        log_tail_mass_M=tail_M,
        entropy_M=entropy_M,
    )


def fused(hidden_MH: Tensor, head: LinearHead, rows: TeacherRows) -> FusedTerms:
    one_M = torch.ones_like(rows.log_tail_mass_M)
    return fused_linear_loss(
        hidden_MH,
        head,
        rows,
        divergence=forward_kl,
        weights=FixedWeights(one_M, one_M),
        topk_overlap=True,
        vocab_size=VOCAB_SIZE,
    )


def stored(rows: TeacherRows, m: int) -> list[int]:
    return [int(token) for token in rows.topk_ids_MK[m] if token != PADDING_ID]


def dense_logprobs(hidden_MH: Tensor, head: LinearHead) -> Tensor:
    return head.logits(hidden_MH).double().log_softmax(dim=-1)


def test_the_measures_of_a_step_are_those_of_the_categories(
    hidden_MH: Tensor, head: LinearHead, rows: TeacherRows
) -> None:
    found = step_measures(rows, fused(hidden_MH, head, rows).student_MC)
    q_MV = dense_logprobs(hidden_MH, head).exp()
    assert set(found) == {*STEP_MEASURES, "teacher_entropy"}
    for m in range(0, NUM_ROWS, 50):
        tokens = stored(rows, m)
        q = [float(q_MV[m, token]) for token in tokens]
        p = rows.topk_logprobs_MK[m][: len(tokens)].exp().tolist()
        q, p = [*q, 1 - sum(q)], [*p, 1 - sum(p)]
        expected = {
            "teacher_topk_mass": 1 - p[-1],
            "student_topk_mass": 1 - q[-1],
            "teacher_tail_mass": p[-1],
            "student_tail_mass": q[-1],
            "overlap": sum(map(min, p, q)),
            "teacher_category_entropy": -sum(x * math.log(x) for x in p),
            "student_category_entropy": -sum(x * math.log(x) for x in q),
            "teacher_entropy": float(rows.entropy_M[m]) if rows.entropy_M is not None else 0.0,
        }
        for name, value in expected.items():
            assert float(found[name][m]) == pytest.approx(value, rel=1e-9), name


def test_an_entropy_of_categories_is_at_most_that_of_the_vocabulary(
    hidden_MH: Tensor, head: LinearHead, rows: TeacherRows
) -> None:
    found = step_measures(rows, fused(hidden_MH, head, rows).student_MC)
    assert bool((found["teacher_category_entropy"] <= found["teacher_entropy"] + 1e-12).all())


def test_a_student_equal_to_the_teacher_overlaps_wholly(rows: TeacherRows) -> None:
    found = step_measures(rows, rows.categories(torch.float64))
    assert_close(found["overlap"], torch.ones(NUM_ROWS, dtype=torch.float64))
    assert_close(found["student_category_entropy"], found["teacher_category_entropy"])


def test_the_overlap_counts_stored_tokens_among_as_many_likeliest_of_the_student(
    hidden_MH: Tensor, head: LinearHead, rows: TeacherRows
) -> None:
    found_M = fused(hidden_MH, head, rows).topk_overlap_M
    assert found_M is not None
    q_MV = dense_logprobs(hidden_MH, head)
    for m in range(NUM_ROWS):
        tokens = stored(rows, m)
        likeliest = q_MV[m].topk(len(tokens)).indices.tolist()
        assert float(found_M[m]) == pytest.approx(len(set(tokens) & set(likeliest)) / len(tokens))
    assert 0 < float(found_M.mean()) < 1


def test_without_a_tail_everything_overlaps(hidden_MH: Tensor, head: LinearHead) -> None:
    dense_MV = torch.zeros(NUM_ROWS, VOCAB_SIZE, dtype=torch.float64).log_softmax(dim=-1)
    everything = TeacherRows(
        hard_M=torch.zeros(NUM_ROWS, dtype=torch.int64),
        topk_ids_MK=torch.arange(VOCAB_SIZE).expand(NUM_ROWS, -1).clone(),
        topk_logprobs_MK=dense_MV,
        log_tail_mass_M=torch.full((NUM_ROWS,), NEG_INF, dtype=torch.float64),
    )
    found_M = fused(hidden_MH, head, everything).topk_overlap_M
    assert found_M is not None
    assert float(found_M.min()) == 1.0


def test_held_out_measures_equal_dense_ones(
    hidden_MH: Tensor, head: LinearHead, rows: TeacherRows
) -> None:
    terms = held_out_terms(hidden_MH, head, rows, vocab_size=VOCAB_SIZE)
    found = {name: measure(terms, rows) for name, measure in HELD_OUT_MEASURES.items()}
    q_MV = dense_logprobs(hidden_MH, head)
    expected_M = -(q_MV.exp() * q_MV).sum(dim=-1)
    assert_close(found["student_entropy"].double(), expected_M, rtol=1e-9, atol=1e-9)
    for m in range(0, NUM_ROWS, 50):
        tokens = stored(rows, m)
        q = [float(q_MV[m, token].exp()) for token in tokens]
        p = rows.topk_logprobs_MK[m][: len(tokens)].exp().tolist()
        q, p = [*q, 1 - sum(q)], [*p, 1 - sum(p)]
        kl = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        reverse = sum(y * math.log(y / x) for x, y in zip(p, q, strict=True))
        assert float(found["kl"][m]) == pytest.approx(kl, rel=1e-8)
        assert float(found["reverse_kl"][m]) == pytest.approx(reverse, rel=1e-8)
        assert float(found["cross_entropy"][m]) == pytest.approx(-float(q_MV[m, rows.hard_M[m]]))
        assert bool(found["agreement"][m]) == (int(q_MV[m].argmax()) == tokens[0])


def test_measuring_changes_neither_value_nor_gradient(
    hidden_MH: Tensor, head: LinearHead, rows: TeacherRows
) -> None:
    one_M = torch.ones_like(rows.log_tail_mass_M)
    found = []
    for topk_overlap in (False, True):
        hidden = hidden_MH.clone().requires_grad_()
        terms = fused_linear_loss(
            hidden,
            head,
            rows,
            divergence=forward_kl,
            weights=FixedWeights(one_M, one_M),
            topk_overlap=topk_overlap,
            vocab_size=VOCAB_SIZE,
        )
        terms.total.backward()
        assert hidden.grad is not None
        found.append((terms.total.detach(), hidden.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
