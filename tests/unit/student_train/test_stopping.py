"""How a training learns that it has to stop."""

import os
import signal
import threading

import pytest

from student_train.errors import TrainingStoppedError
from student_train.stopping import StopRequest


def test_the_first_sigterm_is_noted_and_the_second_kills() -> None:
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_outside_signals_mean_what_they_meant() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_caller_is_asked() -> None:
    answers = [False, True]
    stop = StopRequest(lambda: answers.pop(0))
    assert [stop.asked, stop.asked] == [False, True]


def test_in_another_thread_only_the_caller_is_asked() -> None:
    """Python delivers signals to the main thread."""
    found: list[bool] = []

    def train() -> None:
        with StopRequest(lambda: True) as stop:
            found.append(stop.asked)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_error_says_where_it_stopped_also_after_a_journey() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(TrainingStoppedError(7, 20)))
    with pytest.raises(TrainingStoppedError, match="after step 7 of 20; start it again"):
        raise error
    assert (error.step, error.total_steps) == (7, 20)
