"""One soft weight for all tokens."""

import pytest
from pydantic import ValidationError

from tests.unit.student_train.weight_rows import (
    assert_blend,
    config_of,
    random_teachers,
    rows_of,
    weigh,
)


@pytest.mark.parametrize("soft_weight", [0.0, 0.25, 1.0])
def test_static_gives_every_row_the_configured_weight(soft_weight: float) -> None:
    found = weigh(rows_of(random_teachers(3)), "static", soft_weight=soft_weight)
    assert_blend(found, [soft_weight] * 3)


@pytest.mark.parametrize("name", ["static", "ambiguity", "curriculum", "wsl"])
@pytest.mark.parametrize("soft_weight", [-0.1, 1.1])
def test_a_weight_outside_zero_and_one_is_refused(name: str, soft_weight: float) -> None:
    with pytest.raises(ValidationError, match="soft_weight"):
        config_of(name, soft_weight=soft_weight)
