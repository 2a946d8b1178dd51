"""Colours of the heat map: one hue whose lightness changes steadily.

Lightness is what every kind of colour vision keeps. Tests hold that neighbouring colours differ
for people without red, green or blue cones, and that text is readable on each.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Theme:
    """The seven colours of a heat map, ``#rrggbb``, and of the text on each."""

    heat: tuple[str, ...]
    text: tuple[str, ...]
    paper: str
    """Background of the page."""


LIGHT = Theme(
    heat=("#f1f5f9", "#dbe8f5", "#b5d2ea", "#84b5dc", "#5a9ed0", "#1f64a6", "#0a3670"),
    text=("#1b1f24", "#1b1f24", "#1b1f24", "#1b1f24", "#000000", "#ffffff", "#ffffff"),
    paper="#ffffff",
)
DARK = Theme(
    heat=("#1b222b", "#1d3147", "#204666", "#2a638e", "#4a93c8", "#8cc0e6", "#dceefb"),
    text=("#e4e8ed", "#e4e8ed", "#e4e8ed", "#ffffff", "#000000", "#000000", "#000000"),
    paper="#14171b",
)
