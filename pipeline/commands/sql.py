"""``distill sql``: questions about labels, samples and runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.options import (
    DEFAULT_RUNS,
    JsonOption,
    RunsOption,
    StoreOption,
    console,
    open_store,
    print_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from storage.sql import Result

SHOWN_ROWS = 40
MAX_CELL = 120
"""Characters of a value that a table shows."""
WIDEST = 10_000
"""Columns of the screen on which a table is measured."""


def sql(
    query: Annotated[
        str, typer.Argument(metavar="SQL", help="One SELECT statement.", show_default=False)
    ],
    store: StoreOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=KEY",
            help="Ask only about this label set, and call it NAME: NAME.labels and so on.",
        ),
    ] = None,
    params: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="NAME=VALUE", help="Value of $NAME in the statement."),
    ] = None,
    tokenizer: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Directory of a tokenizer, for the text of tokens."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all rows to a .parquet, .csv or .arrow file."),
    ] = None,
    file_format: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="parquet, csv or arrow; by the ending."),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="Show at most N rows as a table.")
    ] = SHOWN_ROWS,
    as_json: JsonOption = False,
) -> None:
    """Ask a question in SQL about labels, samples, topk and runs; see docs/cookbook.md."""
    from pipeline.run_tables import model_directories, run_tables
    from storage.errors import ConfigError
    from storage.sql import open_database

    if file_format is not None and out is None:
        raise ConfigError("--format says how --out is written; name a file with --out")
    if out is not None:
        from pipeline.result_files import require_format

        file_format = require_format(out, file_format)
    values = {name: parse_value(text) for name, text in pairs(params, "--param").items()}
    shown = console(as_json=as_json)
    with open_database(
        open_store(store),
        pairs(sets, "--set"),
        tokenizers=tokenizer or (),
        models=model_directories(runs),
        tables=run_tables(runs),
    ) as database:
        result = database.query(query, values)
        if out is not None and file_format is not None:
            from pipeline.result_files import write_result

            num_rows = write_result(result, out, file_format)
            shown.print(f"{num_rows} rows written to {out}", highlight=False, soft_wrap=True)
            document: dict[str, Any] = {"out": str(out), "format": file_format, "rows": num_rows}
        elif as_json:
            document = as_document(result)
        else:
            print_rows(result, limit, shown)
        for note in database.notes:
            shown.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
        if as_json:
            print_json({**document, "notes": database.notes})


def pairs(entries: list[str] | None, option: str) -> dict[str, str]:
    """``NAME=VALUE`` words as a dictionary.

    Raises:
        ConfigError: if one has no name, no ``=``, or a name comes twice.
    """
    from storage.errors import ConfigError

    found: dict[str, str] = {}
    for entry in entries or ():
        name, equals, value = entry.partition("=")
        if not name or not equals:
            raise ConfigError(f"{option} takes NAME=VALUE, got {entry!r}")
        if name in found:
            raise ConfigError(f"{option} names {name!r} twice")
        found[name] = value
    return found


def parse_value(text: str) -> Any:
    """A number, true, false, null or a quoted string as JSON has it; any other text as it is."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return text if isinstance(value, dict | list) else value


# -- for programs ---------------------------------------------------------------------------------
def as_document(result: "Result") -> dict[str, Any]:
    """All rows as JSON: numbers that are not finite as null, bytes and dates as text."""
    columns = [{"name": field.name, "type": str(field.type)} for field in result.schema]
    rows = [
        [json_value(value) for value in row]
        for batch in result.batches
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)
    ]
    return {"columns": columns, "rows": rows}


def json_value(value: Any) -> Any:
    """A value of a result as JSON has it."""
    import math
    from decimal import Decimal

    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, dict):
        return {str(name): json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    return str(value)


# -- for people -----------------------------------------------------------------------------------
def print_rows(result: "Result", limit: int, out: "Console") -> None:
    """The first rows as a table, or one below the other where a table is too wide.

    Of a longer result nothing else is read.
    """
    from itertools import islice

    from rich import box
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    rows = list(islice(_rows(result), limit + 1))
    more = f"the first {limit} rows; --limit shows more, --out writes all"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=more if rows[limit:] else None)
    for field in result.schema:
        table.add_column(Text(field.name), justify="right" if is_number(field) else "left")
    for row in rows[:limit]:
        table.add_row(*(Text(cell_text(value)) for value in row))
    if Measurement.get(out, out.options.update(max_width=WIDEST), table).maximum <= out.width:
        out.print(table)
        return
    longest = max(len(field.name) for field in result.schema)
    for number, row in enumerate(rows[:limit], start=1):
        out.rule(f"row {number}", align="left", characters="-")
        for field, value in zip(result.schema, row, strict=True):
            line = Text(f"{field.name:<{longest}}  ").append(cell_text(value))
            out.print(line, soft_wrap=True, highlight=False)
    if rows[limit:]:
        out.print(more, style="italic")


def _rows(result: "Result") -> Iterator[tuple[Any, ...]]:
    for batch in result.batches:
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def is_number(field: Any) -> bool:
    """Whether a column is written to the right."""
    import pyarrow as pa

    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return any(is_kind(field.type) for is_kind in kinds)


def cell_text(value: Any) -> str:
    """A value in one line: control characters escaped, long ones cut."""
    if value is None:
        return "NULL"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."
