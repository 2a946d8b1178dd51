"""Which student is the best, and when a training ends early: functions of the evaluations."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.config import TrainConfig
from student_train.watching.config import EarlyStopConfig
from student_train.watching.step_choice import best_step, selection_warning, should_stop

Line = dict[str, float]


def lines(*values: float, metric: str = "kl") -> list[Line]:
    return [{"step": 10 * n, metric: value} for n, value in enumerate(values, start=1)]


def test_before_the_first_evaluation_nothing_is_best_and_nothing_stops() -> None:
    assert best_step([], "kl") is None
    assert not should_stop([], EarlyStopConfig(metric="kl", patience=1))


def test_less_of_a_divergence_is_better_and_more_of_an_agreement() -> None:
    assert best_step(lines(3, 1, 2), "kl") == 20
    assert best_step(lines(0.3, 0.1, 0.2, metric="agreement"), "agreement") == 10


def test_of_equal_students_the_first_is_the_best() -> None:
    assert best_step(lines(2, 1, 1, 1), "kl") == 20


def test_it_stops_after_patience_evaluations_in_vain() -> None:
    settings = EarlyStopConfig(metric="kl", patience=2)
    course = lines(3, 2, 2.5, 2.0, 1)
    stops = [should_stop(course[:n], settings) for n in range(1, 6)]
    assert stops == [False, False, False, True, False]  # the fifth would not have been made


def test_an_improvement_within_min_delta_is_none() -> None:
    settings = EarlyStopConfig(metric="kl", patience=2, min_delta=0.5)
    assert should_stop(lines(3, 2.8, 2.6), settings)
    assert not should_stop(lines(3, 2.8, 2.4), settings)  # 0.6 below the best before


def test_a_higher_agreement_is_an_improvement() -> None:
    settings = EarlyStopConfig(metric="agreement", patience=1)
    assert not should_stop(lines(0.1, 0.2, 0.3, metric="agreement"), settings)
    assert should_stop(lines(0.3, 0.2, metric="agreement"), settings)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.integers(1, 5))
def test_stopping_is_what_a_plain_count_says(values: list[float], patience: int) -> None:
    best, in_vain = math.inf, 0
    for value in values:
        in_vain = 0 if value < best else in_vain + 1
        best = min(best, value)
    found = should_stop(lines(*values), EarlyStopConfig(metric="kl", patience=patience))
    assert found == (in_vain >= patience)


@pytest.mark.parametrize("metric", ["kl", "reverse_kl"])
@pytest.mark.parametrize("section", ["best", "early_stop"])
def test_a_teacher_forced_kl_comes_with_a_warning(section: str, metric: str) -> None:
    settings = {"model": "m", "heldout": {"every_steps": 5}, section: {"metric": metric}}
    warning = selection_warning(TrainConfig.model_validate(settings))
    assert warning is not None
    assert warning.startswith(metric)
    assert "favours soft labels" in warning


def test_other_metrics_and_no_metric_come_without() -> None:
    settings = {"model": "m", "heldout": {"every_steps": 5}, "best": {"metric": "agreement"}}
    assert selection_warning(TrainConfig.model_validate(settings)) is None
    assert selection_warning(TrainConfig(model="m")) is None
