"""What labelling costs: shown while it runs, noted when it ends."""

import pytest

from pipeline.steps.label_figures import LabelFigures
from teacher_server.label import LabelProgress


def test_engines_cost_from_their_start_to_their_end() -> None:
    figures = LabelFigures(100, began=0.0, engine_hour_cost=36.0)
    figures.engine_began(0, 10.0)
    figures.engine_began(1, 20.0)
    figures.engine_ended(0, 40.0)
    figures.engine_ended(2, 45.0)  # it never started
    assert figures.engine_seconds(50.0) == 30 + 30
    assert figures.cost(50.0) == pytest.approx(0.6)  # 60 s at a cent per second
    assert LabelFigures(100, 0.0, None).cost(50.0) is None


def test_the_line_tells_speed_engines_time_to_go_cost_and_failures() -> None:
    figures = LabelFigures(100, began=0.0, engine_hour_cost=36.0)
    figures.engine_began(0, 0.0)
    figures.add(LabelProgress(20, 16, 0, 400, 600), LabelProgress())
    figures.add(LabelProgress(25, 20, 0, 500, 750), LabelProgress(20, 16, 0, 400, 600))
    figures.failures["engine died"] += 2
    note = figures.note(50.0, working=1, wanted=4)
    # 500 tokens and 25 of 100 samples in 50 s
    assert note == "10 tok/s, 1 of 4 engines, 2 min left, cost 0.50, 2 engine died"


def test_what_is_noted_at_the_end() -> None:
    figures = LabelFigures(2, began=10.0, engine_hour_cost=None)
    figures.engine_began(0, 12.0)
    figures.add(LabelProgress(2, 2, 1, 30, 40), LabelProgress())
    assert figures.facts(20.0) == {
        "teacher_forward_tokens": 40,
        "response_tokens": 30,
        "tokens_per_second": 3.0,
        "engine_seconds": 8.0,
        "failures": {},
        "retried_samples": 0,
    }
