"""The numbers of a report as one HTML page; every text in it is escaped."""

import importlib.resources
from functools import cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from pipeline.inspection.measures import MEASURES
from pipeline.inspection.page import script_json
from pipeline.inspection.pieces import spoken
from pipeline.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_style, loss_chart

TERMS = (
    ("loss", "Total", "what the training minimises"),
    ("soft", "Soft term", "divergence from the teacher"),
    ("hard", "Hard term", "of the hard labels, cross-entropy as a rule"),
)
HELD_OUT = ("heldout-kl", "Held-out KL", "to the teacher, during the training")
METRICS = (
    ("kl", "KL to the teacher", "nats per token, lower is better", "low"),
    ("cross_entropy", "Cross-entropy of the hard labels", "nats per token, lower is better", "low"),
    ("agreement", "Top-1 agreement", "share of tokens, higher is better", "high"),
)


def render_report(report: dict[str, Any]) -> str:
    """The HTML page of a report."""
    charts = [
        (name, title, meaning, loss_chart(report["students"], name))
        for name, title, meaning in TERMS
    ]
    return str(
        _template().render(
            report=report,
            data=script_json(report),
            css=_resource("page.css"),
            js=_resource("page.js"),
            metrics=METRICS,
            charts=charts,
            watched=[(*HELD_OUT, loss_chart(report["students"], "kl", "heldout_curve"))],
            legend=[(n, s) for n, s in enumerate(report["students"]) if s["curve"]],
            line_style=line_style,
            spoken=spoken,
            box={
                "left": LEFT,
                "right": RIGHT,
                "top": TOP,
                "bottom": BOTTOM,
                "width": WIDTH,
                "height": HEIGHT,
            },
            entropy_edges=MEASURES["entropy"].edges,
        )
    )


@cache
def _resource(name: str) -> Markup:
    """A file of this package, trusted as it is."""
    text = importlib.resources.files("pipeline.report").joinpath(name).read_text("utf-8")
    return Markup(text)  # noqa: S704 - our own file


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(str(_resource("page.html.jinja")))
