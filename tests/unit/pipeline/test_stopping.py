"""The first signal is a request, the second one is not."""

import signal
import threading

import pytest

from pipeline.stopping import stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_does_what_it_did_before(
    number: signal.Signals,
) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda n, frame: seen.append(n))
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(number)
            assert stop.requested
            assert seen == []
            signal.raise_signal(number)
        assert seen == [number]
        signal.raise_signal(number)
        assert seen == [number, number]
    finally:
        signal.signal(number, before)


def test_other_threads_cannot_be_asked() -> None:
    asked: list[bool] = []

    def work() -> None:
        with stop_on_signals() as stop:
            asked.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]
