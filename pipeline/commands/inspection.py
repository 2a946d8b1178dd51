"""``distill inspect``: samples of a label set, token by token."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import (
    JsonOption,
    KeyArgument,
    StoreOption,
    console,
    open_store,
    print_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.inspection.source import Inspector

TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="DIR|ids",
        help="Directory of the teacher's tokenizer; ids shows numbers.",
    ),
]
WithOption = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="KEY", help="Label set of the same tokens to compare with."),
]
StudentOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--student", metavar="DIR", help="Student to compare with; at most two. Needs torch."
    ),
]
DEFAULT_LIMIT = 20
DEFAULT_TOP = 10


def inspect(
    key: KeyArgument,
    store: StoreOption = None,
    sample: Annotated[
        list[str] | None, typer.Option("--sample", metavar="KEY", help="Only this sample.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="SQL", help="Condition on the view samples."),
    ] = None,
    sort: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--sort",
            metavar="FIELD asc|desc",
            help="key, tokens, or the mean of a measure: kl, entropy, ...",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="Samples, at most.")
    ] = DEFAULT_LIMIT,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="MEASURE",
            help="Colour tokens by entropy, tail, surprise, rank, bridge or kl.",
        ),
    ] = None,
    position: Annotated[
        int | None,
        typer.Option("--position", metavar="N", min=0, help="Show the candidates of a position."),
    ] = None,
    top: Annotated[
        int, typer.Option("--top", metavar="K", min=1, help="Candidates of a position.")
    ] = DEFAULT_TOP,
    compare: WithOption = None,
    student: StudentOption = None,
    tokenizer: TokenizerOption = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the first sample's page.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at samples of a label set token by token, also while it is being labelled."""
    from pipeline.inspection.choose import default_measure
    from pipeline.inspection.measures import measure_named

    if by is not None:
        measure_named(by)
    out = console(as_json=as_json)
    inspector = open_inspector(key, store, compare, student, tokenizer)
    keys = _keys(inspector, sample, where, sort, limit, tokenizer)
    measure = by or default_measure(inspector)
    if html is not None:
        _write_page(inspector, keys[0], html, measure, top, out)
    if as_json:
        from pipeline.inspection.record import describe

        print_json([describe(found, top=top) for found in inspector.read(keys)])
    elif html is None:
        _show(inspector, keys, measure, position, top, out)


def open_inspector(
    key: str,
    store: str | None,
    compare: list[str] | None,
    student: list[Path] | None,
    tokenizer: str | None,
) -> "Inspector":
    """A label set with what it is compared with.

    Raises:
        LabelStoreError: if a label set does not exist.
        ConfigError: if the tokenizer is not here, or the comparison is not possible.
    """
    from pipeline.inspection.source import Inspector, find_vocabulary

    opened = open_store(store)
    label_set = opened.open(key)
    return Inspector(
        label_set,
        opened.uri,
        find_vocabulary(label_set, tokenizer),
        others=[opened.open(other) for other in compare or ()],
        students=student or (),
    )


def _keys(
    inspector: "Inspector",
    sample: list[str] | None,
    where: str | None,
    sort: tuple[str, str] | None,
    limit: int,
    tokenizer: str | None,
) -> list[str]:
    """The samples that were asked for, at least one."""
    from pipeline.inspection.choose import Choice, chosen_keys
    from pipeline.inspection.listing import Listing
    from storage.errors import ConfigError, LabelStoreError

    if sample:
        if where is not None or sort is not None:
            raise ConfigError("--sample names samples; it cannot be used with --where or --sort")
        inspector.label_set.locate(sample)
        return sample
    field, order = sort or (None, "asc")
    if order not in ("asc", "desc"):
        raise ConfigError(f"--sort takes a field and asc or desc, got {order!r}")
    choice = Choice(where, field, order == "desc")
    if choice.needs_query:
        found = chosen_keys(inspector, choice, limit=limit, tokenizer=tokenizer)
    else:
        listing = Listing(inspector.label_set)
        listing.num_samples()
        found = [entry.key for entry in listing.page(0, limit)]
    if not found:
        which = "has no sample that meets the condition" if where else "has no sample yet"
        raise LabelStoreError(f"label set {inspector.label_set.key} {which}")
    return found


def _write_page(
    inspector: "Inspector", key: str, file: Path, measure: str, top: int, out: "Console"
) -> None:
    from pipeline.inspection.page import PAGE_TOP, render_sample
    from storage.errors import ConfigError
    from storage.files import write_atomically

    (inspected,) = inspector.read([key])
    page = render_sample(inspected, by=measure, top=max(top, PAGE_TOP))
    try:
        write_atomically(file, page.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {str(file)!r}: {error.strerror}") from error
    out.print(f"{file}: sample {key}", markup=False, highlight=False, soft_wrap=True)


def _show(
    inspector: "Inspector",
    keys: list[str],
    measure: str,
    position: int | None,
    top: int,
    out: "Console",
) -> None:
    from pipeline.inspection.terminal import sample_view

    if sys.stdin.isatty() and sys.stdout.isatty():
        from pipeline.inspection.browse import Browser, ask_line, browse

        browse(
            Browser(
                keys,
                lambda key: next(inspector.read([key])),
                out,
                measure=measure,
                top=top,
                ask=ask_line,
                position=position,
            )
        )
        return
    for inspected in inspector.read(keys):
        out.print(sample_view(inspected, measure, position=position, top=top))
        out.print()
