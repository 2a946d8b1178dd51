"""Stopping in good order: what is in flight is finished and committed, then the command ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from storage.errors import DistillError

EXIT_CODE = 128 + signal.SIGTERM
"""How shells report a process that SIGTERM ended."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(DistillError):
    """The command was asked to stop and did; running it again goes on."""


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block, the first SIGTERM or SIGINT is a request; the second ends the process."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        restore()

    for number in STOP_SIGNALS:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
