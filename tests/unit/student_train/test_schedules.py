"""What depends on the step alone: the learning rate, and the quantities that losses ask for."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.config import OptimizerConfig
from student_train.schedules import StepState, learning_rate

SHAPES = ["cosine", "linear", "constant", "wsd"]


def rates(total: int, **settings: object) -> list[float]:
    config = OptimizerConfig(lr=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(config, step, total) for step in range(total)]


def test_the_rate_rises_evenly_during_the_warm_up() -> None:
    # 0.4 * 10 = 4 steps of warm-up
    found = rates(10, warmup_ratio=0.4, schedule="constant")
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6)


def test_the_linear_decay_ends_at_the_floor() -> None:
    # 4 steps of decay between peak and floor 0.1: 1, 0.7, 0.4, 0.1
    found = rates(4, warmup_ratio=0.0, schedule="linear", min_lr_ratio=0.1)
    assert found == pytest.approx([1.0, 0.7, 0.4, 0.1])


def test_the_cosine_decay_is_half_way_down_in_the_middle() -> None:
    found = rates(5, warmup_ratio=0.0, schedule="cosine", min_lr_ratio=0.0)
    # (1 + cos(pi x)) / 2 at x = 0, 1/4, 1/2, 3/4, 1
    assert found == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0], abs=1e-7)


def test_the_constant_schedule_ignores_the_floor() -> None:
    assert rates(3, warmup_ratio=0.0, schedule="constant", min_lr_ratio=0.0) == [1.0] * 3


def test_wsd_stays_at_the_peak_and_falls_at_the_end() -> None:
    # progress 0, 1/8, ..., 1; the last half of it falls from 1 to 0.2 in four equal steps
    found = rates(9, warmup_ratio=0.0, schedule="wsd", decay_ratio=0.5, min_lr_ratio=0.2)
    assert found == pytest.approx([1.0] * 5 + [0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("schedule", SHAPES)
def test_a_training_of_one_step_runs_at_the_peak(schedule: str) -> None:
    assert rates(1, schedule=schedule) == [1.0]


@given(
    schedule=st.sampled_from(SHAPES),
    total=st.integers(1, 300),
    warmup=st.floats(0, 0.99),
    floor=st.floats(0, 1),
)
def test_the_rate_stays_between_zero_and_the_peak_and_has_one_top(
    schedule: str, total: int, warmup: float, floor: float
) -> None:
    found = rates(total, schedule=schedule, warmup_ratio=warmup, min_lr_ratio=floor)
    assert min(found) >= 0
    assert max(found) <= 1 + 1e-12
    top = found.index(max(found))
    rising, falling = found[: top + 1], found[top:]
    assert rising == sorted(rising)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(falling))


def test_progress_runs_from_zero_at_the_first_step_to_one_at_the_last() -> None:
    found = [StepState(step, 5).schedule for step in range(5)]
    assert found == [{"progress": progress} for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]


def test_a_training_of_one_step_has_made_no_progress() -> None:
    assert StepState(0, 1).schedule == {"progress": 0.0}


def test_t_is_there_where_something_moves_it() -> None:
    assert StepState(0, 1, t=0.4).schedule == {"progress": 0.0, "t": 0.4}
