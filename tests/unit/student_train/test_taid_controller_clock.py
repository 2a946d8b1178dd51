"""The clock of a training: who may move t, when, and that a resume goes on with the same t."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from student_train.config import HybridLossConfig, TaidLossConfig, TaidScheduleConfig
from student_train.schedules import StepState
from student_train.step_clock import StepClock


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    """A process group without other ranks, as a plain training has."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def taid(**schedule: Any) -> TaidLossConfig:
    return TaidLossConfig(schedule=TaidScheduleConfig(alpha=0.5, **schedule))


def run(clock: StepClock, steps: range) -> list[list[float | None]]:
    """Two micro-batches of a step each; the t that they see, step by step."""
    found = []
    for step in steps:
        seen = []
        for soft in (8.0 / (step + 1), 4.0 / (step + 1)):
            seen.append(clock.now(step).t)
            clock.after_micro_batch(soft, 2, step=step)
        clock.after_step(12.0 / (step + 1), 4, step=step)
        found.append(seen)
    return found


def test_other_losses_have_no_t_and_nothing_to_save() -> None:
    clock = StepClock(HybridLossConfig(), 10)
    assert run(clock, range(3)) == [[None, None]] * 3
    assert clock.state() == {}
    assert clock.now(2) == StepState(step=2, total_steps=10, t=None)


def test_t_moves_between_optimiser_steps_only() -> None:
    found = run(StepClock(taid(), 10), range(5))
    assert all(first == second for first, second in found)
    per_step = [first for first, _ in found]
    assert per_step[:2] == [0.4, 0.4]  # the first loss is only remembered
    assert per_step[1:] == sorted(set(per_step))  # type: ignore[type-var]


def test_the_authors_mode_moves_t_after_every_micro_batch() -> None:
    found = run(StepClock(taid(updates="local_micro_batch"), 10), range(3))
    seen = [t for pair in found for t in pair]
    assert seen[:2] == [0.4, 0.4]
    assert seen[1:] == sorted(set(seen))  # type: ignore[type-var]


def test_a_hybrid_with_the_soft_term_taid_has_a_schedule_too() -> None:
    assert StepClock(HybridLossConfig.model_validate({"soft": "taid"}), 10).now(0).t == 0.4


@pytest.mark.parametrize("updates", ["optimizer_step", "local_micro_batch"])
def test_a_resume_sees_the_same_t(updates: str) -> None:
    whole, half = (StepClock(taid(updates=updates), 10) for _ in range(2))
    expected = run(whole, range(8))
    run(half, range(4))
    resumed = StepClock(taid(updates=updates), 10)
    resumed.restore(half.state())
    assert run(resumed, range(4, 8)) == expected[4:]


def test_reading_the_clock_does_not_move_it() -> None:
    clock = StepClock(taid(), 10)
    run(clock, range(3))
    before = clock.state()
    assert clock.now(3) == clock.now(3)
    assert clock.state() == before
