"""Who trains which student, whatever dies: the queue without any process."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.steps.student_queue import NO_STUDENT, StudentQueue, unfinished


def states(queue: StudentQueue) -> list[str]:
    return [student.state for student in queue.students()]


def test_slots_take_what_waits_until_nothing_is_left() -> None:
    queue = StudentQueue(3, restarts=2)
    assert [queue.take(0), queue.take(1)] == [0, 1]
    queue.done(1)
    assert queue.take(1) == 2
    queue.done(0)
    assert queue.take(0) == NO_STUDENT
    queue.done(1)
    assert states(queue) == ["trained"] * 3
    assert not unfinished(queue.students())


def test_a_slot_that_died_goes_on_with_its_student() -> None:
    queue = StudentQueue(2, restarts=1)
    assert queue.take(0) == 0
    queue.died(0, "killed")
    queue.died(0, "killed")  # Ray tells of one death more than once
    assert queue.take(0) == 0
    assert queue.students()[0].deaths == 1


def test_a_training_that_dies_at_the_same_step_again_and_again_fails_and_the_next_one_begins() -> (
    None
):
    queue = StudentQueue(2, restarts=2)
    for _ in range(3):
        assert queue.take(0) == 0
        queue.reached(0, 7)
        queue.died(0, "out of memory")
    assert queue.take(0) == 1
    assert states(queue) == ["failed", "training"]
    assert queue.students()[0].why == "out of memory"


def test_a_training_that_gets_further_every_time_may_die_as_often_as_it_likes() -> None:
    queue = StudentQueue(1, restarts=1)
    for steps in range(1, 20):
        assert queue.take(0) == 0
        queue.reached(0, steps)
        queue.reached(0, steps - 1)  # what a restart repeats
        queue.died(0, "the machine was taken away")
    assert queue.take(0) == 0
    queue.died(0, "the machine was taken away")
    assert states(queue) == ["failed"]


def test_an_error_that_would_come_again_is_not_tried_again() -> None:
    queue = StudentQueue(2, restarts=5)
    queue.take(0)
    queue.died(0, "student and labels do not fit", final=True)
    assert queue.take(0) == 1
    assert states(queue) == ["failed", "training"]


def test_a_slot_that_dies_before_it_takes_a_student_is_broken() -> None:
    queue = StudentQueue(1, restarts=1)
    queue.died(0, "no module")
    assert queue.broken() == []
    queue.died(0, "no module")
    assert queue.broken() == [0]
    queue.give_up("no module")
    assert [(s.state, s.why) for s in queue.students()] == [("failed", "no module")]


def test_a_slot_that_ended_has_not_trained_its_student() -> None:
    queue = StudentQueue(2, restarts=1)
    queue.take(0)
    queue.gone(0, "the placement group was removed")
    queue.gone(0, "the placement group was removed")
    assert states(queue) == ["failed", "waiting"]


def test_after_a_stop_nothing_is_given_out() -> None:
    queue = StudentQueue(3, restarts=1)
    queue.take(0)
    queue.take(1)
    assert not queue.stopping()
    queue.stop()
    assert queue.stopping()
    queue.stopped(0, "at step 12 of 30")
    assert queue.take(0) == NO_STUDENT
    assert queue.take(1) == NO_STUDENT  # it had died, and was started again
    assert states(queue) == ["stopped", "stopped", "waiting"]
    assert queue.students()[0].why == "at step 12 of 30"


@given(
    count=st.integers(1, 5),
    slots=st.integers(1, 3),
    story=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["done", "died", "further"]))),
)
def test_no_student_is_trained_by_two_slots_or_lost(
    count: int, slots: int, story: list[tuple[int, str]]
) -> None:
    """Any interleaving of ends and deaths, then everybody works to the end."""
    queue = StudentQueue(count, restarts=1)
    at_work = {slot: queue.take(slot) for slot in range(slots)}
    for choice, what in story:
        slot = choice % slots
        number = at_work[slot]
        if number != NO_STUDENT:
            if what == "further":
                queue.reached(number, queue.students()[number].furthest + 1)
                continue
            queue.done(slot) if what == "done" else queue.died(slot, "killed")
        at_work[slot] = queue.take(slot)
        busy = [n for n in at_work.values() if n != NO_STUDENT]
        assert len(busy) == len(set(busy))
        assert states(queue).count("training") == len(busy)
    while unfinished(queue.students()):
        for slot in range(slots):
            if at_work[slot] != NO_STUDENT:
                queue.done(slot)
            at_work[slot] = queue.take(slot)
    assert set(states(queue)) <= {"trained", "failed"}
    for student in queue.students():
        assert (student.state == "failed") == (student.in_vain > 1)
