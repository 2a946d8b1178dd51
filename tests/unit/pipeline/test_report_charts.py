"""Axes enclose what is drawn, and thinned curves keep its mean."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.charts import BOTTOM, LEFT, MAX_POINTS, RIGHT, TOP, axis, loss_chart, thinned

numbers = st.floats(-1e6, 1e6)


def curve(values: list[float]) -> list[dict[str, Any]]:
    return [{"step": n, "loss": value} for n, value in enumerate(values, start=1)]


@given(numbers, numbers)
def test_an_axis_encloses_its_range_in_a_few_even_steps(one: float, other: float) -> None:
    low, high = sorted((one, other))
    ticks = axis(low, high, smallest=1e-12)
    size = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * size
    assert high <= ticks[-1] + 1e-6 * size
    assert 2 <= len(ticks) <= 8
    assert all(b - a == pytest.approx(size, rel=1e-6) for a, b in pairwise(ticks))


@given(st.lists(numbers, min_size=1, max_size=600), st.integers(1, 50))
def test_thinning_takes_means_of_neighbours(values: list[float], most: int) -> None:
    points = thinned(curve(values), "loss", most)
    assert len(points) <= most
    assert points[-1][0] == len(values)
    size = math.ceil(len(values) / most)
    weights = [min(size, len(values) - n * size) for n in range(len(points))]
    mean = sum(w * v for w, (_, v) in zip(weights, points, strict=True)) / len(values)
    assert mean == pytest.approx(sum(values) / len(values), rel=1e-6, abs=1e-6)


def test_lines_stay_within_the_axes() -> None:
    students: list[dict[str, Any]] = [
        {"curve": curve([5.0 / n for n in range(1, 1000)])},
        {"curve": []},
    ]
    chart = loss_chart(students, "loss")
    assert chart is not None
    (line,) = chart.lines
    places = [tuple(map(float, place.split(","))) for place in line.points.split()]
    assert len(places) <= MAX_POINTS
    assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in places)
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert line.student == 0


def test_held_out_evaluations_have_a_curve_of_their_own() -> None:
    evaluated = {"curve": curve([5.0]), "heldout_curve": [{"step": 9, "kl": 2.0}]}
    chart = loss_chart([{"curve": [], "heldout_curve": []}, evaluated], "kl", "heldout_curve")
    assert chart is not None
    assert [line.student for line in chart.lines] == [1]


def test_steps_without_a_number_are_left_out() -> None:
    assert thinned([{"step": 1, "loss": None}, {"step": 2, "loss": 3.0}], "loss", 9) == [(2, 3.0)]
    assert loss_chart([{"curve": [{"step": 1, "loss": None}]}], "loss") is None
