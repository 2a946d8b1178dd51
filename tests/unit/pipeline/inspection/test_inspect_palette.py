"""The heat map can be read by everybody: contrast of text, and colours without some of the cones.

Simulation of dichromats in linear RGB with the matrices of Vienot, Brettel and Mollon (1999) for
protanopia and deuteranopia, and of Machado, Oliveira and Fernandes (2009) for tritanopia.
"""

from itertools import pairwise

import numpy as np
import pytest

from pipeline.inspection.palette import DARK, LIGHT, Theme

THEMES = {"light": LIGHT, "dark": DARK}
VISION = {
    "all cones": np.eye(3),
    "protanopia": np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
    "deuteranopia": np.array(
        [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ XYZ[1])


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def lab(colour: str, vision: np.ndarray) -> np.ndarray:
    """CIELAB of a colour as somebody sees it."""
    seen = np.clip(vision @ linear(colour), 0.0, 1.0)
    ratio = XYZ @ seen / WHITE
    cube = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * cube[1] - 16, 500 * (cube[0] - cube[1]), 200 * (cube[1] - cube[2])])


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_text_is_readable_on_every_colour(theme: Theme) -> None:
    for heat, text in zip(theme.heat, theme.text, strict=True):
        assert contrast(heat, text) >= 4.5, (heat, text)


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
@pytest.mark.parametrize("vision", VISION)
def test_neighbouring_colours_differ_for_everybody(theme: Theme, vision: str) -> None:
    seen = [lab(colour, VISION[vision]) for colour in theme.heat]
    distances = [float(np.linalg.norm(a - b)) for a, b in pairwise(seen)]
    assert min(distances) >= 5.0, distances


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
@pytest.mark.parametrize("vision", VISION)
def test_lightness_tells_the_order_for_everybody(theme: Theme, vision: str) -> None:
    lightness = np.array([lab(colour, VISION[vision])[0] for colour in theme.heat])
    steps = np.diff(lightness)
    assert (steps < -2.0).all() or (steps > 2.0).all(), lightness


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_the_strongest_colour_stands_out_from_the_page(theme: Theme) -> None:
    assert contrast(theme.heat[-1], theme.paper) > 7.0
    assert contrast(theme.heat[0], theme.paper) < 1.3
