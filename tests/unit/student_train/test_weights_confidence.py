"""One minus the likeliest token's probability, or that of the hard label."""

from tests.unit.student_train.weight_rows import (
    ONE_HOT,
    assert_blend,
    random_teachers,
    rows_of,
    weigh,
)


def test_confidence_is_one_minus_the_largest_probability() -> None:
    p_MV = random_teachers(6)
    assert_blend(weigh(rows_of(p_MV), "confidence"), 1 - p_MV.amax(dim=-1))


def test_confidence_of_the_label_is_one_minus_its_probability_even_outside_the_top_k() -> None:
    p_MV = random_teachers(6)
    hard_M = p_MV.argmin(dim=-1)
    rows = rows_of(p_MV, k=3, hard_M=hard_M)
    assert_blend(weigh(rows, "confidence", of="label"), 1 - p_MV.amin(dim=-1))


def test_a_one_hot_teacher_leaves_nothing_to_the_soft_labels() -> None:
    for options in ({"name": "confidence"}, {"name": "entropy"}, {"name": "ambiguity"}):
        assert weigh(rows_of(ONE_HOT), **options).soft_M.item() == 0.0


def test_a_log_prob_that_was_rounded_above_zero_is_certain() -> None:
    rows = rows_of(ONE_HOT)
    rows.topk_logprobs_MK[:, 0] = 1e-3
    assert weigh(rows, "confidence").soft_M.item() == 0.0
