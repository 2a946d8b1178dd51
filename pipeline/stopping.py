"""Stopping in good order: what is in flight is finished and committed, then the command ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from storage.errors import DistillError

EXIT_CODE = 128 + signal.SIGTERM
"""How shells report a process that SIGTERM ended."""


class StoppedError(DistillError):
    """The command was asked to stop and did; running it again goes on."""


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Within the block, the first SIGTERM is a request; the second one ends the process."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    before = signal.getsignal(signal.SIGTERM)

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
