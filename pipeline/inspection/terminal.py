"""An inspected sample in the terminal: coloured text, a legend, the table of one position."""

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pipeline.inspection.measures import MEASURES, measure_named
from pipeline.inspection.palette import LIGHT
from pipeline.inspection.pieces import Piece, plain, single, visible
from pipeline.inspection.record import InspectedSample, Prediction
from storage.labels.base import UNUSED_ID

HEAT = [Style(color=text, bgcolor=heat) for heat, text in zip(LIGHT.heat, LIGHT.text, strict=True)]
"""Both colours are set, so that the text is readable whatever the terminal's own are."""

SELECTED = Style(reverse=True, bold=True)
QUIET = Style(dim=True)
SPECIAL = Style(italic=True)


def sample_view(
    inspected: InspectedSample, measure: str, *, position: int | None = None, top: int = 10
) -> RenderableType:
    """The whole sample: heading, prompt, coloured response, legend, numbers.

    Raises:
        ConfigError: if the measure is not known for this sample, or the position not labelled.
    """
    if position is not None:
        inspected.row_of(position)
    sample = inspected.sample
    shown = inspected.telling(measure)
    facts = [
        f"sample {sample.key}",
        f"{len(sample.response_ids_R):,} tokens, {len(sample.positions_N):,} labelled",
        f"ended by {sample.stop_reason or sample.finish_reason}",
    ]
    parts: list[RenderableType] = [
        Text("   ".join(facts), style="bold"),
        Padding(prompt_text(inspected), (0, 0, 0, 2)),
        Rule(style=QUIET),
        response_text(inspected, shown, measure, position=position),
        Rule(style=QUIET),
        legend(shown, measure),
        numbers(inspected),
    ]
    if position is not None:
        parts.append(position_view(inspected, position, top=top))
    return Group(*parts)


def prompt_text(inspected: InspectedSample) -> Text:
    """The prompt, without colours."""
    text = Text(style=QUIET)
    for place, piece in enumerate(inspected.prompt):
        _append(text, piece, place, Style())
    return text


def response_text(
    inspected: InspectedSample, shown: Prediction, measure: str, *, position: int | None = None
) -> Text:
    """The response; every labelled token in the colour of its value, others plain.

    A character of several tokens has the strongest of their colours.
    """
    values_N = shown.require(measure)
    levels: dict[int, int] = {}
    for place, value in zip(inspected.sample.positions_N.tolist(), values_N.tolist(), strict=True):
        first = inspected.response[place].first
        levels[first] = max(levels.get(first, 0), measure_named(measure).level(value))
    selected = None if position is None else inspected.response[position].first
    disagrees = {
        inspected.response[place].first
        for place in inspected.sample.positions_N[inspected.disagrees_N].tolist()
    }
    text = Text()
    for place, piece in enumerate(inspected.response):
        style = HEAT[levels[piece.first]] if piece.first in levels else QUIET
        if piece.first in disagrees:
            style += Style(underline=True)
        _append(text, piece, place, SELECTED if piece.first == selected else style)
    return text


def _append(text: Text, piece: Piece, place: int, style: Style) -> None:
    """Add a token; the first of several that share characters brings the text of all."""
    if piece.first != place:
        return
    if piece.kind in ("special", "unknown"):
        style += SPECIAL
    for run, is_sign in visible(piece.text if piece.joined is None else piece.joined):
        text.append(run, style + QUIET if is_sign else style)


def legend(shown: Prediction, measure: str) -> Text:
    """What the colours mean."""
    what = measure_named(measure)
    unit = f", {what.unit}" if what.unit == "nats" else ""
    text = Text(f"{what.title} ({shown.name}{unit}): ")
    for style, words in zip(HEAT, what.ranges(), strict=True):
        text.append(f" {words} ", style)
        text.append(" ")
    return text


def numbers(inspected: InspectedSample) -> Table:
    """Means of every measure and model."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("mean of")
    for found in inspected.predictions:
        table.add_column(plain(found.name), justify="right")
    for name, measure in MEASURES.items():
        means = [
            measure.format(float(np.mean(found.values[name]))) if name in found.values else ""
            for found in inspected.predictions
        ]
        if any(means):
            unit = f", {measure.unit}" if measure.unit == "nats" else ""
            table.add_row(f"{measure.title}{unit}", *means)
    if len(inspected.predictions) > 1:
        share = float(inspected.disagrees_N.mean())
        table.add_row("Likeliest tokens differ (underlined)", f"{100 * share:.1f} %")
    return table


def position_view(inspected: InspectedSample, position: int, *, top: int) -> RenderableType:
    """The candidates of one position, of every model.

    Raises:
        ConfigError: if the position is not labelled.
    """
    row = inspected.row_of(position)
    piece = inspected.response[position]
    heading = Text(f"position {position}, sampled {plain(piece.text)!r} (id {piece.token_id})")
    if piece.joined is not None or piece.first != position:
        whole = inspected.response[piece.first].joined or ""
        heading.append(f", a part of {plain(whole)!r}")
    tables = [_candidates(inspected, found, row, top) for found in inspected.predictions]
    query = Text(f'distill sql "{inspected.sql(position)}"', style=QUIET)
    return Group(Text(), heading, *tables, query)


def _candidates(inspected: InspectedSample, found: Prediction, row: int, top: int) -> Table:
    facts = ", ".join(
        f"{name} {measure.format(float(found.values[name][row]))}"
        for name, measure in MEASURES.items()
        if name in found.values
    )
    table = Table(
        title=Text(f"{found.name}: {facts}"), title_justify="left", box=None, pad_edge=False
    )
    for title in ("rank", "probability"):
        table.add_column(title, justify="right")
    table.add_column("")
    table.add_column("token")
    table.add_column("id", justify="right")
    sampled = int(inspected.sample.token_ids_N[row])
    ids, logprobs = found.topk_ids_NK[row], found.topk_logprobs_NK[row]
    for place, (token_id, logprob) in enumerate(zip(ids.tolist(), logprobs.tolist(), strict=True)):
        if place == top or token_id == UNUSED_ID:
            break
        table.add_row(*_candidate(inspected, place + 1, token_id, logprob, sampled))
    shown = ids[:top]
    if sampled not in shown:
        rank, logprob = int(found.values["rank"][row]), -float(found.values["surprise"][row])
        table.add_row(*_candidate(inspected, rank, sampled, logprob, sampled))
    return table


def _candidate(
    inspected: InspectedSample, rank: int, token_id: int, logprob: float, sampled: int
) -> list[RenderableType]:
    probability = float(np.exp(min(logprob, 0.0)))
    token = plain(single(token_id, inspected.vocabulary).text)
    mark = " <- sampled" if token_id == sampled else ""
    return [
        Text(str(rank)),
        Text(f"{100 * probability:.3f} %"),
        Text("\u2588" * round(20 * probability)),
        Text(token + mark, style="bold" if mark else ""),
        Text(str(token_id)),
    ]
