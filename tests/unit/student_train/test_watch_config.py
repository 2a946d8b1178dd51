"""Settings of watching: what they refuse, and what of them decides about the student."""

from typing import Any

import pytest
from pydantic import ValidationError

from student_train.config import TrainConfig


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"model": "m", **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"watch": {"trackers": ["tensorboard"]}},
        {"watch": {"peak_tflops": 0}},
        {"heldout": {"every_steps": 0}},
        {"heldout": {"samples": 0}},
        {"heldout": {"every_steps": 1}, "best": {"metric": "student_entropy"}},
        {"heldout": {"every_steps": 1}, "early_stop": {"metric": "kl", "patience": 0}},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**changes)


@pytest.mark.parametrize("section", ["best", "early_stop"])
def test_what_looks_at_the_evaluation_needs_one(section: str) -> None:
    with pytest.raises(ValidationError, match=f"{section} looks at the evaluation.*every_steps"):
        config(**{section: {"metric": "kl"}})


def test_watching_alone_decides_nothing() -> None:
    watched = config(
        watch={"trackers": ["wandb"], "peak_tflops": 1}, heldout={"every_steps": 5, "samples": 3}
    )
    assert watched.deciding() == config().deciding()


def test_evaluation_decides_where_something_looks_at_it() -> None:
    best = config(heldout={"every_steps": 5}, best={"metric": "kl"})
    assert best.deciding() != config().deciding()
    fewer = config(heldout={"every_steps": 5, "samples": 3}, best={"metric": "kl"})
    assert fewer.deciding() != best.deciding()
    answers = {"every_steps": 5, "generations": 9, "max_new_tokens": 3}
    assert config(heldout=answers, best={"metric": "kl"}).deciding() == best.deciding()
