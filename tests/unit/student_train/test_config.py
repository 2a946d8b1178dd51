"""Settings of the student: what they refuse, and that jobs survive the way to a worker."""

from typing import Any

import pytest
from pydantic import ValidationError

from storage.keys import StratifiedSpec
from student_train.config import (
    EvaluateConfig,
    HybridLossConfig,
    LabelSource,
    OptimizerConfig,
    PrunedModelConfig,
    SupervisionConfig,
    TaidScheduleConfig,
    TrainConfig,
    TrainJob,
    missing_columns,
    required_columns,
)
from student_train.losses.config import ReverseKlConfig
from student_train.weights.config import EntropyWeightConfig, StaticWeightConfig


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"seed": -1},
        {"dtype": "float16"},
        {"checkpoint": {"every_steps": 0}},
        {"batch": {"tokens": 0}},
        {"batch": {"micro_tokens": 0}},
        {"deepspeed": {"stage": 4}},
        {"loss": {"soft": "kl"}},
        {"loss": {"soft": {"type": "jsd", "beta": 1.5}}},
        {"loss": {"hard": "greedy"}},
        {"loss": {"hard_term": "chi2"}},
        {"loss": {"hard_term": {"type": "risk_guided", "alpha": 0}}},
        {"loss": {"student_entropy": -0.1}},
        {"loss": {"type": "minillm"}},
        {"loss": {"type": "taid", "soft": {"type": "jsd"}}},
        {"loss": {"weight": "confident"}},
        {"loss": {"weight": {"type": "sidecar"}}},
        {"loss": {"weight": {"type": "static", "reverse": True}}},
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
            model=PrunedModelConfig(keep_layers=(2, 0)),
            loss=HybridLossConfig(soft=ReverseKlConfig(), weight=EntropyWeightConfig()),
        ),
        output="o",
        card={"student": "x"},
    )
    assert TrainJob.model_validate_json(job.model_dump_json()) == job


# -- the loss -------------------------------------------------------------------------------------
def loss_of(value: Any) -> SupervisionConfig:
    return TrainConfig.model_validate({"model": "m", "loss": value}).loss


def test_the_default_is_the_static_hybrid_of_forward_kl_and_the_sampled_token() -> None:
    loss = TrainConfig(model="m").loss
    assert loss == loss_of({"type": "hybrid"})
    assert (loss.soft.type, loss.weight, loss.hard) == (
        "forward_kl",
        StaticWeightConfig(),
        "sampled",
    )
    assert (loss.hard_term.type, loss.student_entropy) == ("cross_entropy", 0.0)


def test_sections_may_be_written_short() -> None:
    """A name for a type, and no type where it is the default one."""
    short = {"soft": "reverse_kl", "weight": "entropy", "hard_term": "risk_guided"}
    long = {name: {"type": value} for name, value in short.items()}
    assert loss_of(short) == loss_of({"type": "hybrid", **long})
    assert loss_of("taid") == loss_of({"type": "taid"})
    assert loss_of({"weight": {"soft_weight": 0.3}}).weight == StaticWeightConfig(soft_weight=0.3)


def test_taid_has_its_published_constants_and_no_hard_term() -> None:
    loss = loss_of("taid")
    assert loss.weight == StaticWeightConfig(soft_weight=1.0)
    assert loss.taid_schedule == TaidScheduleConfig()


def test_only_taid_has_a_schedule() -> None:
    assert loss_of({"soft": "jsd"}).taid_schedule is None
    assert loss_of({"soft": "taid"}).taid_schedule == TaidScheduleConfig()
    changed = {"soft": "taid", "schedule": {"mode": "linear"}}
    assert loss_of(changed).taid_schedule == TaidScheduleConfig(mode="linear")
    with pytest.raises(ValidationError, match=r"schedule moves the t of TAID, .* is jsd"):
        loss_of({"soft": "jsd", "schedule": {}})


@pytest.mark.parametrize("weight", ["wsl", {"type": "confidence", "of": "label"}])
def test_a_weight_by_the_probability_of_a_random_label_is_refused(weight: Any) -> None:
    with pytest.raises(ValidationError, match="not stored for random tokens"):
        loss_of({"hard": "random", "weight": weight})
    assert loss_of({"hard": "random", "weight": "confidence"}).hard == "random"


@pytest.mark.parametrize(
    ("loss", "columns"),
    [
        ({}, []),
        ({"weight": "entropy"}, ["entropy"]),
        ({"weight": {"type": "entropy", "measure": "power_sum"}}, ["power_sum_10"]),
        ({"soft": {"type": "forward_kl", "tail": "sampled"}}, ["tail_samples"]),
        (
            {"soft": {"type": "forward_kl", "temperature": 2.0}, "weight": "entropy"},
            ["entropy", "power_sums"],
        ),
    ],
    ids=str,
)
def test_a_loss_names_the_label_columns_that_it_needs(loss: Any, columns: list[str]) -> None:
    assert required_columns(loss_of(loss)) == set(columns)
    assert missing_columns(loss_of(loss), ()) == columns


def test_columns_that_are_stored_are_not_missing() -> None:
    loss = loss_of(
        {"soft": {"type": "forward_kl", "tail": "sampled"}, "weight": {"type": "entropy"}}
    )
    assert missing_columns(loss, ("entropy", StratifiedSpec(draws=4))) == []
    assert missing_columns(loss, ("power_sums", StratifiedSpec(draws=4))) == ["entropy"]
    assert missing_columns(loss, ("entropy",)) == ["tail_samples"]


# -- what decides ---------------------------------------------------------------------------------
def test_fetching_does_not_decide_what_a_student_becomes() -> None:
    plain = TrainConfig(model="m")
    other = TrainConfig.model_validate(
        {"model": "n", "checkpoint": {"every_steps": 3}, "loader": {"workers": 4, "prefetch": 9}}
    )
    assert plain.deciding() == other.deciding()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch": {"packing": "padded"}},
        {"batch": {"row_tokens": 100}},
        {"batch": {"lanes": 8}},
        {"batch": {"window_tokens": 100}},
        {"data": {"filter": {"finish_reason": ["stop"]}}},
        {"data": {"filter": {"sql": "response_tokens > 3"}}},
        {"data": {"weight": 0.5}},
        {"data": {"mixture": [{"label_set": "a", "selection": "b"}]}},
        {"data": {"k": 4}},
        {"data": {"supervise": "last_turn"}},
    ],
    ids=str,
)
def test_what_is_trained_on_does(change: dict[str, object]) -> None:
    plain = TrainConfig(model="m")
    assert TrainConfig.model_validate({"model": "m", **change}).deciding() != plain.deciding()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepspeed": {"offload_optimizer": True}}, "set stage to 1, 2 or 3"),
        ({"deepspeed": {"stage": 2, "offload_parameters": True}}, "stage is 2; set it to 3"),
        ({"deepspeed": {"stage": 1, "offload_optimizer": True}}, "set optimizer.type: cpu_adam"),
    ],
    ids=["optimizer at stage 0", "parameters at stage 2", "without cpu_adam"],
)
def test_offload_that_deepspeed_does_not_have_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate({"model": "n", **changes})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_that_deepspeed_has_is_accepted(stage: int) -> None:
    deepspeed = {"stage": stage, "offload_optimizer": True, "offload_parameters": stage == 3}
    train = TrainConfig.model_validate(
        {"model": "n", "optimizer": {"type": "cpu_adam"}, "deepspeed": deepspeed}
    )
    assert train.deepspeed.offload_optimizer
