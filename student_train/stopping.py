"""How a training learns that it has to stop: a signal, or its caller."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class StopRequest:
    """Whether somebody asked this process to stop; a context manager.

    Inside, the first SIGTERM is noted and the second one kills, as it would outside. Only the main
    thread can listen for signals; a training in another one has a caller who does.

    Args:
        should_stop: Asked once per optimiser step, on every rank; None where nobody is.
    """

    def __init__(self, should_stop: Callable[[], bool] | None = None) -> None:
        self._should_stop = should_stop
        self._signalled = False
        self._listens = threading.current_thread() is threading.main_thread()

    @property
    def asked(self) -> bool:
        """Whether this process was asked; the others may not have been."""
        return self._signalled or (self._should_stop is not None and self._should_stop())

    def __enter__(self) -> Self:
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
