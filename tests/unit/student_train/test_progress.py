"""What a person sees of a training: a bar, or lines where there is no terminal."""

import io

from rich.console import Console

from student_train.watching.progress import Pace, StepProgress


def line(step: int, *, seconds: float = 2.0, total: int = 10) -> dict[str, float]:
    return {
        "step": step,
        "total_steps": total,
        "loss": 1.5,
        "seconds": seconds,
        "tokens": 1000,
        "data_wait_s": 0.5,
    }


def test_the_pace_is_that_of_the_last_steps() -> None:
    pace = Pace()
    pace.add(line(1, seconds=100.0))
    for step in range(2, 40):
        pace.add(line(step))
    assert pace.text(30) == "500 tok/s, waits 25.0%, 0:01:00 left"


def test_without_a_terminal_there_is_a_line_at_the_end() -> None:
    output = io.StringIO()
    progress = StepProgress(Console(file=output, width=40))
    for step in range(1, 11):
        progress.show(line(step))
    progress.close()
    shown = output.getvalue().splitlines()
    assert shown == ["step 10 of 10, loss 1.5000, 500 tok/s, waits 25.0%, 0:00:00 left"]


def test_in_a_terminal_there_is_a_bar() -> None:
    output = io.StringIO()
    progress = StepProgress(Console(file=output, force_terminal=True, width=120))
    progress.show(line(4))
    progress.say("step 4, held out: kl 1.0")
    progress.close()
    shown = output.getvalue()
    assert "4/10" in shown
    assert "500 tok/s, waits 25.0%, 0:00:12 left" in shown
    assert "held out: kl 1.0" in shown
