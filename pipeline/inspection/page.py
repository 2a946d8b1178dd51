"""An inspected sample as one self-contained HTML page.

Text of labels is hostile until it is escaped: Jinja escapes it in the markup, and in the embedded
JSON no ``<`` is left that could end the script element.
"""

import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from pipeline.inspection.measures import MEASURES, measure_named
from pipeline.inspection.palette import DARK, LIGHT, Theme
from pipeline.inspection.pieces import Piece, plain, spoken, visible
from pipeline.inspection.record import InspectedSample, describe

CHARTS = ("entropy", "tail", "kl")
CHART_WIDTH, CHART_HEIGHT = 640, 148
PAGE_TOP = 20
"""Candidates per position that a page holds."""


@dataclass(frozen=True, slots=True)
class Links:
    """Where the samples around this one are, for pages of a server."""

    all: str
    previous: str | None = None
    next: str | None = None


def render_sample(
    inspected: InspectedSample, *, by: str, top: int = PAGE_TOP, links: Links | None = None
) -> str:
    """The page of a sample.

    Args:
        inspected: The sample.
        by: Measure by which tokens are coloured at first.
        top: Candidates per position and model.
        links: Where its neighbours are; None for a page that stands alone.

    Raises:
        ConfigError: if no model has the measure.
    """
    inspected.telling(by).require(by)
    data = _page_data(inspected, top)
    return render(
        "page.html.jinja",
        data=data,
        data_json=script_json(data),
        js=_resource("page.js"),
        by=by,
        links=links,
        measures=MEASURES,
        shown_measures=[n for n in MEASURES if any(n in p.values for p in inspected.predictions)],
        means=[
            {name: float(values.mean()) for name, values in found.values.items()}
            for found in inspected.predictions
        ],
        prompt=[_token(piece, place) for place, piece in enumerate(inspected.prompt)],
        panes=[_pane(inspected, number, by) for number in range(len(inspected.predictions))],
        charts=[chart for name in CHARTS if (chart := _chart(inspected, name)) is not None],
    )


def stylesheet() -> Markup:
    """The styles of all pages, with the colours of the heat map in both themes."""
    dark = "\n".join(_heat_rules(DARK))
    rules = [*_heat_rules(LIGHT), "@media screen and (prefers-color-scheme: dark) {", dark, "}"]
    return _resource("page.css") + Markup("\n".join(rules))  # noqa: S704 - our own constants


def _heat_rules(theme: Theme) -> list[str]:
    pairs = zip(theme.heat, theme.text, strict=True)
    return [
        f".h{level} {{ background: {heat}; color: {text}; }}"
        for level, (heat, text) in enumerate(pairs)
    ]


def script_json(data: Any) -> Markup:
    """JSON for a script element: a ``<`` in it would let a token end the element."""
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")
    return Markup(text.replace("&", "\\u0026"))  # noqa: S704 - nothing of HTML is left in it


@cache
def _resource(name: str) -> Markup:
    """A file of this package, trusted as it is."""
    text = importlib.resources.files("pipeline.inspection").joinpath(name).read_text("utf-8")
    return Markup(text)  # noqa: S704 - our own file


@cache
def _template(name: str) -> Any:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(str(_resource(name)))


def render(name: str, **values: Any) -> str:
    """A page of this package from its template; every text in it is escaped."""
    return str(_template(name).render(css=stylesheet(), **values))


# -- what the template shows -----------------------------------------------------------------------
def _page_data(inspected: InspectedSample, top: int) -> dict[str, Any]:
    """The description, with what the script says aloud and shows on one line."""
    data = describe(inspected, top=top)
    for place, piece in enumerate(inspected.response):
        token = data["response"][place]
        whole = inspected.response[piece.first].joined
        token["shown"], token["spoken"] = plain(piece.text), spoken(piece.text) or piece.text
        token["adds"] = (piece.joined or "") if whole is not None else piece.text
        if whole is not None:
            token["part_of"] = plain(whole)
    for token in data["tokens"].values():
        token["shown"], token["spoken"] = (
            plain(token["text"]),
            spoken(token["text"]) or token["text"],
        )
    data["measures"] = {
        name: {**asdict(measure), "ranges": measure.ranges()} for name, measure in MEASURES.items()
    }
    return data


def _pane(inspected: InspectedSample, number: int, by: str) -> dict[str, Any]:
    """The response in the colours of one model."""
    found = inspected.predictions[number]
    values_N, measure = found.values.get(by), measure_named(by)
    rows = {place: row for row, place in enumerate(inspected.sample.positions_N.tolist())}
    differs_N = inspected.disagrees_N
    tokens = []
    for place, piece in enumerate(inspected.response):
        row = rows.get(place)
        level = None if row is None or values_N is None else measure.level(float(values_N[row]))
        differs = row is not None and bool(differs_N[row])
        tokens.append({**_token(piece, place), "row": row, "level": level, "differs": differs})
    return {"name": found.name, "measure": by if values_N is not None else None, "tokens": tokens}


def _token(piece: Piece, place: int) -> dict[str, Any]:
    return {
        "position": place,
        "kind": piece.kind,
        "alone": piece.kind == "part" and piece.joined is None and piece.first == place,
        "runs": visible(piece.text),
        "whole": None if piece.joined is None else visible(piece.joined),
        "label": _label(piece),
    }


def _label(piece: Piece) -> str | None:
    """What a screen reader says instead of a token's text, where that would be nothing."""
    if piece.kind == "part":
        whole = "" if piece.joined is None else f" of {piece.joined}"
        return f"bytes {plain(piece.text)}{whole}"
    return spoken(piece.text)


def _chart(inspected: InspectedSample, name: str) -> dict[str, Any] | None:
    """Curves of one measure along the positions, one per model that has it."""
    measure = measure_named(name)
    known = [
        (number, found)
        for number, found in enumerate(inspected.predictions)
        if name in found.values
    ]
    if not known:
        return None
    largest = max(float(found.values[name].max()) for _, found in known)
    means = ", ".join(
        f"{found.name} {measure.format(float(found.values[name].mean()))}" for _, found in known
    )
    return {
        "name": name,
        "title": measure.title,
        "meaning": measure.meaning,
        "largest": measure.format(largest),
        "description": f"{measure.title} along the response; largest {measure.format(largest)}, "
        f"means: {means}",
        "lines": [
            {"number": number, "name": found.name, "points": _points(found.values[name], largest)}
            for number, found in known
        ],
    }


def _points(values: Sequence[float] | np.ndarray, largest: float) -> str:
    last = max(len(values) - 1, 1)
    scale = CHART_HEIGHT / largest if largest > 0 else 0.0
    return " ".join(
        f"{CHART_WIDTH * place / last:.1f},{1 + CHART_HEIGHT - value * scale:.1f}"
        for place, value in enumerate(np.asarray(values).tolist())
    )
