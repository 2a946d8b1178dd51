"""What tokens can be coloured and samples be sorted by."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from storage.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Measure:
    """One number per position."""

    title: str
    meaning: str
    unit: str
    """``nats``, ``share`` or ``rank``."""
    edges: tuple[float, ...]
    """Six values at which the colour changes; a value on an edge has the stronger colour."""

    def level(self, value: float) -> int:
        """Which of the seven colours a value has, 0 is the faintest."""
        return bisect_right(self.edges, value)

    def format(self, value: float) -> str:
        """A value for people, without its unit."""
        if self.unit == "rank":
            return f"{value:,.0f}"
        if self.unit == "nats":
            return f"{value:.3f}"
        percent = 100 * value
        return f"{percent:.2g} %" if 0 < percent < 0.1 else f"{percent:.1f} %"

    def ranges(self) -> list[str]:
        """The seven ranges of values, faintest first."""
        shown = [self.short(edge) for edge in self.edges]
        between = [f"{low} to {high}" for low, high in pairwise(shown)]
        return [f"below {shown[0]}", *between, f"{shown[-1]} and more"]

    def short(self, value: float) -> str:
        """An edge in as few characters as possible."""
        return f"{100 * value:g} %" if self.unit == "share" else f"{value:g}"


MEASURES = {
    "entropy": Measure(
        "Entropy",
        "how unsure the model is, over the whole vocabulary",
        "nats",
        (0.1, 0.5, 1.0, 1.5, 2.0, 3.0),
    ),
    "tail": Measure(
        "Tail mass",
        "probability of everything outside the stored tokens",
        "share",
        (0.0001, 0.001, 0.01, 0.03, 0.1, 0.3),
    ),
    "surprise": Measure(
        "Surprise of the sampled token",
        "its negative log-prob",
        "nats",
        (0.1, 0.5, 1.0, 2.0, 4.0, 8.0),
    ),
    "rank": Measure(
        "Rank of the sampled token",
        "1 is the likeliest",
        "rank",
        (2, 3, 5, 10, 50, 200),
    ),
    "bridge": Measure(
        "Bridge score",
        "probability of the likeliest token: near 100 % a bridge, near 0 % a garden",
        "share",
        (0.2, 0.4, 0.6, 0.8, 0.95, 0.99),
    ),
    "kl": Measure(
        "KL to the labels",
        "divergence from the labels' distribution, the tail as one category",
        "nats",
        (0.01, 0.05, 0.1, 0.3, 1.0, 3.0),
    ),
}


def measure_named(name: str) -> Measure:
    """A measure by its name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in MEASURES:
        raise ConfigError(f"there is no measure {name!r}; choose one of {', '.join(MEASURES)}")
    return MEASURES[name]
