"""``distill unpack``: the labels of an archive, added to a store."""

from dataclasses import asdict
from typing import Annotated

import typer

from pipeline.commands.options import (
    DEFAULT_STORE,
    JsonOption,
    StoreOption,
    console,
    print_json,
)


def unpack(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A path, - for stdin, or s3://...")
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add the samples of an archive to a store; those that it has already stay as they are."""
    from pipeline.progress import byte_bar
    from storage.pack import unpack as unpack_set
    from storage.provenance import provenance
    from storage.store import LabelStore

    opened = LabelStore(store or DEFAULT_STORE, create=True)
    out = console(as_json=as_json)
    with byte_bar(out, "unpacking", None) as advance:
        done = unpack_set(source, opened, provenance(), advance=advance)
    if as_json:
        print_json({"store": opened.uri, **asdict(done)})
    else:
        out.print(
            f"{done.num_new} of {done.num_samples} samples are new in label set {done.key} of "
            f"{opened.uri}",
            highlight=False,
            soft_wrap=True,
        )
