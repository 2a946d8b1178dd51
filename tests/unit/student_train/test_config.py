"""Settings of the student: what they refuse, and that jobs survive the way to a worker."""

from typing import Any

import pytest
from pydantic import ValidationError

from student_train.config import (
    EvaluateConfig,
    HybridLossConfig,
    LabelSource,
    OptimizerConfig,
    PrunedModelConfig,
    TrainConfig,
    TrainJob,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"seed": -1},
        {"dtype": "float16"},
        {"checkpoint_every_steps": 0},
        {"batch": {"tokens": 0}},
        {"batch": {"micro_tokens": 0}},
        {"deepspeed": {"stage": 3}},
        {"loss": {"soft": "jsd"}},
        {"loss": {"hard": "greedy"}},
        {"loss": {"type": "taid"}},
        {"loss": {"weight": {"soft_weight": 1.5}}},
        {"optimizer": {"lr": 0}},
        {"optimizer": {"warmup_ratio": 1}},
        {"optimizer": {"schedule": "step"}},
        {"optimizer": {"betas": (0.9, 1.0)}},
        {"optimizer": {"max_grad_norm": 0}},
        {"model": {"keep_layers": []}},
        {"model": {"keep_layers": [0, 1, 0]}},
        {"learning_rate": 1e-3},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({"model": "m", **changes})


def test_a_layer_cannot_be_kept_twice() -> None:
    """The two copies would share their weights, and a checkpoint cannot say so."""
    with pytest.raises(ValidationError, match=r"keep_layers \[0, 1, 0\] names a layer twice"):
        PrunedModelConfig(keep_layers=(0, 1, 0))


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        OptimizerConfig().lr = 1.0  # type: ignore[misc]


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValidationError, match="metrics"):
        EvaluateConfig(metrics=("bleu",))  # type: ignore[arg-type]


def test_a_job_is_the_same_after_the_way_to_a_worker() -> None:
    job = TrainJob(
        labels=LabelSource(store="s", label_set="a" * 32, selection="b" * 32),
        model="m",
        tokenizer="t",
        train=TrainConfig(
            model=PrunedModelConfig(keep_layers=(2, 0)), loss=HybridLossConfig(soft="reverse_kl")
        ),
        output="o",
        card={"student": "x"},
    )
    assert TrainJob.model_validate_json(job.model_dump_json()) == job
