"""TAID's t: exactly the published machine, and nothing is lost or moved by accident."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from student_train.config import TaidScheduleConfig
from student_train.errors import StudentError
from student_train.taid_controller import TaidController

losses_of_a_run = st.lists(st.floats(0, 20), min_size=1, max_size=40)


def published(
    losses: list[float],
    *,
    t_start: float = 0.4,
    t_end: float = 1.0,
    alpha: float = 5e-4,
    beta: float = 0.99,
    disable_adaptive: bool = False,
) -> list[float]:
    """The authors' update, line by line, in float64; t after every step."""
    t, prev_loss, momentum = np.float64(t_start), np.inf, np.float64(0.0)
    found = []
    for global_step, value in enumerate(losses):
        loss = np.float64(value)
        if np.isinf(prev_loss):
            prev_loss = loss
            found.append(float(t))
            continue
        relative_change = (prev_loss - loss) / (prev_loss + 1e-15)
        momentum = beta * momentum + (1 - beta) * relative_change
        with np.errstate(over="ignore"):
            adaptive_delta = 1 / (1 + np.exp(-momentum))
        t_target = t_start + (t_end - t_start) * global_step / len(losses)
        delta_t = alpha * adaptive_delta * (1 - t)
        t = t_target if disable_adaptive else min(t_end, max(t_target, t + delta_t))
        prev_loss = loss
        found.append(float(t))
    return found


def course(losses: list[float], **options: Any) -> list[float]:
    controller = TaidController(TaidScheduleConfig(**options), len(losses))
    found = []
    for step, loss in enumerate(losses):
        controller.observe(loss * 7, 7, step=step)
        found.append(controller.t)
    return found


def made_up_losses(count: int) -> list[float]:
    random = np.random.default_rng(0)
    return (2 * np.exp(-np.arange(count) / 200) + 0.5 * random.random(count)).tolist()


# -- the published course ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"start": 0.2, "alpha": 0.2}, {"t_start": 0.2, "alpha": 0.2}),
        ({"alpha": 0.05, "momentum": 0.5, "end": 0.9}, {"alpha": 0.05, "beta": 0.5, "t_end": 0.9}),
        ({"mode": "linear", "start": 0.1}, {"disable_adaptive": True, "t_start": 0.1}),
    ],
)
def test_t_takes_the_published_course(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    losses = made_up_losses(500)
    # a sum over seven rows divided by seven is rounded twice
    np.testing.assert_allclose(course(losses, **ours), published(losses, **theirs), rtol=1e-13)


def test_the_published_course_leaves_the_straight_line_in_long_runs_only() -> None:
    """Below 2 / alpha = 4000 updates the adaptive mode has no effect."""
    for count, differs in ((1000, False), (12000, True)):
        losses = made_up_losses(count)
        adaptive, linear = course(losses), course(losses, mode="linear")
        assert (max(np.subtract(adaptive, linear)) > 0.01) == differs


def test_a_rescaled_alpha_gives_a_short_run_the_course_of_a_long_one() -> None:
    short = course(made_up_losses(500), reference_steps=10000)
    # the same losses, each for twenty steps
    long = course([loss for loss in made_up_losses(500) for _ in range(20)])
    np.testing.assert_allclose(short[100::100], long[2000::2000], atol=0.01)
    assert max(np.subtract(short, course(made_up_losses(500)))) > 0.05


def test_a_loss_of_zero_is_no_division_by_zero() -> None:
    assert course([0.0, 0.0, 1.0, 0.0]) == published([0.0, 0.0, 1.0, 0.0])


def test_a_loss_that_explodes_from_nothing_slows_t_down_without_an_overflow() -> None:
    """The relative change is -1e15: the sigmoid of its momentum is 0."""
    found = course([0.0] * 5 + [1e10] * 5, alpha=1.0, momentum=0.0)
    linear = [0.4 + 0.6 * step / 10 for step in range(10)]
    assert all(math.isfinite(t) for t in found)
    assert found[5] == max(found[4], linear[5])


# -- properties -----------------------------------------------------------------------------------
@given(losses_of_a_run, st.floats(0, 0.9), st.floats(0.9, 1.0), st.floats(0, 1))
def test_t_rises_from_start_to_end_and_stays_above_the_straight_line(
    losses: list[float], start: float, end: float, alpha: float
) -> None:
    found = course(losses, start=start, end=end, alpha=alpha)
    assert found == sorted(found)
    assert found[0] == start
    assert found[-1] <= end
    for step, t in enumerate(found[1:], start=1):
        assert t >= min(end, start + (end - start) * step / len(losses)) - 1e-12


@given(losses_of_a_run, st.integers(0, 40))
def test_a_resume_through_json_goes_on_bit_by_bit(losses: list[float], place: int) -> None:
    config = TaidScheduleConfig(alpha=0.1)
    whole, half = (TaidController(config, len(losses)) for _ in range(2))
    for step, loss in enumerate(losses):
        if step == place:
            text = json.dumps(half.state(), allow_nan=False)
            half = TaidController(config, len(losses))
            half.restore(json.loads(text))
        assert half.t == whole.t
        whole.observe(3 * loss, 3, step=step)
        half.observe(3 * loss, 3, step=step)
    assert half.state() == whole.state()


def test_reading_t_does_not_move_it() -> None:
    """Evaluation reads; only the training loop observes."""
    controller = TaidController(TaidScheduleConfig(), 10)
    controller.observe(1.0, 1, step=0)
    before = controller.state()
    assert [controller.t for _ in range(3)] == [0.4] * 3
    assert controller.state() == before


def test_no_rows_are_no_observation() -> None:
    controller = TaidController(TaidScheduleConfig(), 10)
    before = controller.state()
    controller.observe(0.0, 0, step=5)
    assert controller.state() == before


def test_only_the_ratio_of_sum_and_count_matters() -> None:
    """So ranks and accumulation may be cut at will."""
    one, other = (TaidController(TaidScheduleConfig(), 3) for _ in range(2))
    for step, loss in enumerate([4.0, 2.0, 1.0]):
        one.observe(loss, 1, step=step)
        other.observe(8 * loss, 8, step=step)
    assert one.state() == other.state()


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(loss: float) -> None:
    controller = TaidController(TaidScheduleConfig(), 10)
    with pytest.raises(StudentError, match=r"soft loss of step 4 is (nan|inf)"):
        controller.observe(loss, 2, step=3)


# -- settings -------------------------------------------------------------------------------------
def test_the_defaults_are_the_published_ones() -> None:
    config = TaidScheduleConfig()
    assert (config.start, config.end, config.alpha, config.momentum) == (0.4, 1.0, 5e-4, 0.99)
    assert (config.mode, config.updates, config.reference_steps) == (
        "adaptive",
        "optimizer_step",
        None,
    )


@pytest.mark.parametrize(
    "options",
    [{"start": 1.0}, {"end": 0.0}, {"alpha": 1.5}, {"momentum": 1.0}, {"start": 0.8, "end": 0.5}],
)
def test_values_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TaidScheduleConfig(**options)  # type: ignore[arg-type]
