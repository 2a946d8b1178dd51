"""Why trainings die, and what is said of them; Ray is not started."""

import pytest

from pipeline.steps.student_queue import StudentTraining
from pipeline.steps.student_runs import judge
from pipeline.steps.train import StudentsFailedError, require_all_trained
from pipeline.stopping import StoppedError
from storage.errors import StoreAccessError
from student_train.errors import NonFiniteLossError, PreflightError


class CarriedError(PreflightError):
    """An error as Ray brings it from another process."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"ray::worker()\nTraceback (most recent call last)\n{cause}")
        self.cause = cause


def test_the_failure_that_a_user_can_fix_is_named_before_those_that_follow_from_it() -> None:
    errors = [
        RuntimeError("connection closed by peer"),
        CarriedError(PreflightError("too few layers")),
    ]
    why, final = judge(errors)
    assert "too few layers" in why
    assert final


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (NonFiniteLossError("loss is NaN at step 3"), True),
        (StoreAccessError("cannot read s3://labels"), False),  # it may be back in a minute
        (RuntimeError("Connection reset"), False),
        (MemoryError("cannot allocate"), False),
    ],
)
def test_what_would_happen_again_is_not_tried_again(error: Exception, final: bool) -> None:
    why, judged = judge([error])
    assert judged == final
    assert str(error) in why


def test_a_traceback_is_shortened_to_its_last_line() -> None:
    text = "worker failed\nTraceback (most recent call last):\n  File ...\nKeyError: 'x'"
    assert judge([RuntimeError(text)])[0] == "KeyError: 'x'"


def test_of_a_process_that_died_its_end_is_told() -> None:
    class HealthCheckError(RuntimeError):
        health_check_failure = RuntimeError(
            "The actor died.\n\tpid: 7\nThe actor is dead because its process has died."
        )

    why, final = judge([HealthCheckError("A worker health check failed.\nWorker info: ...")])
    assert why == "a process died: its process has died."
    assert not final


def test_students_that_failed_are_named_with_reason_and_way_out() -> None:
    students = {
        "a": StudentTraining(state="trained"),
        "b": StudentTraining(state="failed", why="loss is NaN at step 3"),
        "c": StudentTraining(state="failed", why="out of memory"),
    }
    with pytest.raises(StudentsFailedError) as raised:
        require_all_trained(students, {})
    text = str(raised.value)
    assert text.startswith("2 of 3 students could not be trained:\n  b: loss is NaN at step 3\n")
    assert "a trained and published" in text
    assert "--set students.NAME=null" in text


def test_a_stop_says_how_far_each_one_is() -> None:
    students = {
        "a": StudentTraining(state="trained"),
        "b": StudentTraining(state="stopped", why="stopped at step 12 of 30"),
        "c": StudentTraining(),
    }
    with pytest.raises(StoppedError, match="1 of 3 students are trained") as raised:
        require_all_trained(students, {"b": 12})
    assert "b stopped at step 12 of 30; c waits at step 0" in str(raised.value)


def test_nothing_is_said_where_all_are_trained() -> None:
    require_all_trained({"a": StudentTraining(state="trained")}, {})
