"""``distill view``: a label set in the browser."""

from typing import Annotated

import typer

from pipeline.commands.inspection import StudentOption, TokenizerOption, WithOption, open_inspector
from pipeline.commands.options import KeyArgument, StoreOption, console


def view(
    key: KeyArgument,
    store: StoreOption = None,
    port: Annotated[
        int,
        typer.Option("--port", metavar="N", min=0, max=65535, help="A free one by default."),
    ] = 0,
    compare: WithOption = None,
    student: StudentOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Serve a label set to the browsers of this machine, read-only, until Ctrl-C."""
    from pipeline.inspection.server import LOOPBACK, Viewer, make_server

    out = console(as_json=False)
    inspector = open_inspector(key, store, compare, student, tokenizer)
    with make_server(Viewer(inspector, tokenizer), port=port) as server:
        address = f"http://{LOOPBACK}:{server.server_port}/"
        out.print(f"label set {inspector.label_set.key}: {address} (Ctrl-C ends)", soft_wrap=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            out.print("ended")
