"""Line charts as places on a drawing: axes with round numbers, and one line per student."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

WIDTH, HEIGHT = 400, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 390, 10, 226
MAX_POINTS: Final = 150
"""Longer curves are drawn as means of neighbouring steps."""
ALL_POINTS: Final = 12_000
"""Points of all lines of a chart together, however many students there are."""
FEWEST_POINTS: Final = 12
COLOURS: Final = 7
DASHES: Final = ("none", "7 4", "2 3", "9 3 2 3", "14 4")
"""With seven colours, 35 lines differ."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A number at an axis."""

    place: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """One student."""

    student: int
    """Its number among all students."""
    points: str
    """As a polyline takes them."""
    end: tuple[str, str]
    """Where its last point is."""


@dataclass(frozen=True, slots=True)
class Chart:
    """What there is to draw."""

    across: list[Tick]
    up: list[Tick]
    lines: list[Line]


def line_style(student: int) -> str:
    """Colour and dashes of a student's line."""
    dashes = DASHES[student % len(DASHES)]
    return f"stroke: var(--s{student % COLOURS}); stroke-dasharray: {dashes}"


def loss_chart(students: Sequence[dict[str, Any]], term: str, curve: str = "curve") -> Chart | None:
    """The curves of one number; None if no student has a point.

    Args:
        students: What the report says of them.
        term: Name of the number in the points of a curve.
        curve: Which curve: of the training's steps, or of its held-out evaluations.
    """
    most = max(FEWEST_POINTS, min(MAX_POINTS, ALL_POINTS // max(1, len(students))))
    curves = [
        (number, points)
        for number, student in enumerate(students)
        if (points := thinned(student[curve], term, most))
    ]
    if not curves:
        return None
    values = [value for _, points in curves for _, value in points]
    last_step = max(step for _, points in curves for step, _ in points)
    steps = axis(0, last_step, smallest=1)
    heights = axis(min(values), max(values), smallest=1e-12)

    def x(step: float) -> float:
        return LEFT + (step - steps[0]) / (steps[-1] - steps[0]) * (RIGHT - LEFT)

    def y(value: float) -> float:
        return BOTTOM - (value - heights[0]) / (heights[-1] - heights[0]) * (BOTTOM - TOP)

    digits = max(0, -math.floor(math.log10(heights[1] - heights[0]) + 1e-9))
    lines = []
    for number, points in curves:
        places = [(f"{x(step):.1f}", f"{y(value):.1f}") for step, value in points]
        drawn = " ".join(map(",".join, places))
        lines.append(Line(number, drawn, places[-1]))
    return Chart(
        across=[Tick(x(step), f"{step:,.0f}") for step in steps],
        up=[Tick(y(value), f"{value:.{digits}f}") for value in heights],
        lines=lines,
    )


def thinned(curve: Sequence[dict[str, Any]], term: str, most: int) -> list[tuple[int, float]]:
    """At most so many points: means of neighbouring steps, each at the last of its steps.

    Steps whose loss is no number are left out.
    """
    curve = [point for point in curve if point[term] is not None]
    size = math.ceil(len(curve) / most)
    parts = [curve[start : start + size] for start in range(0, len(curve), size or 1)]
    return [
        (part[-1]["step"], math.fsum(point[term] for point in part) / len(part)) for part in parts
    ]


def axis(low: float, high: float, *, smallest: float, wanted: int = 5) -> list[float]:
    """Round numbers, evenly spaced and at least two, that enclose a range."""
    span = (high - low) or abs(high) or 1.0
    # numbers that differ by less would be the same ones in print, or in floats
    span = max(span, 1e-6 * abs(low), 1e-6 * abs(high), smallest)
    power = 10.0 ** math.floor(math.log10(span / wanted))
    size = max(smallest, next(f * power for f in (1, 2, 5, 10) if f * power >= span / wanted))
    first = math.floor(low / size + 1e-9)
    last = max(first + 1, math.ceil(high / size - 1e-9))
    return [number * size for number in range(first, last + 1)]
