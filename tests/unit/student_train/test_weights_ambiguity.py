"""How far the likeliest token is from certain among the possible ones."""

import torch

from tests.unit.student_train.weight_rows import (
    UNIFORM,
    V,
    assert_blend,
    random_teachers,
    rows_of,
    weigh,
)


def test_ambiguity_is_relative_to_a_uniform_choice_among_the_possible_tokens() -> None:
    """Four possible tokens: as flat as it gets is 3/4 from certain."""
    p_MV = torch.zeros(3, V, dtype=torch.float64)
    p_MV[:, :4] = torch.tensor(
        [[0.25] * 4, [0.4, 0.3, 0.2, 0.1], [1.0, 0, 0, 0]], dtype=torch.float64
    )
    found = weigh(rows_of(p_MV, k=6), "ambiguity", soft_weight=0.8)
    assert_blend(found, [0.8, 0.8 * 0.6 / 0.75, 0.0])


def test_a_row_with_a_tail_may_say_every_token() -> None:
    p_MV = random_teachers(6)
    expected_M = 0.5 * (1 - p_MV.amax(dim=-1)) / (1 - 1 / V)
    assert_blend(weigh(rows_of(p_MV, k=4), "ambiguity"), expected_M)
    assert_blend(weigh(rows_of(p_MV, k=V), "ambiguity"), expected_M)


def test_a_uniform_teacher_gets_the_whole_soft_weight() -> None:
    assert_blend(weigh(rows_of(UNIFORM, k=1), "ambiguity", soft_weight=0.3), [0.3])
