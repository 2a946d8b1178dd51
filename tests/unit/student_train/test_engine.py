"""What DeepSpeed is told, and what is made of its answers."""

from typing import Any

import pytest

from student_train.config import TrainConfig
from student_train.engine import deepspeed_config, grad_norm
from student_train.errors import NonFiniteLossError


class Engine:
    def __init__(self, norm: float) -> None:
        self._norm = norm

    def get_global_grad_norm(self) -> float:
        return self._norm


def config(monkeypatch: pytest.MonkeyPatch, **train: Any) -> dict[str, Any]:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return deepspeed_config(TrainConfig.model_validate({"model": "m", **train}))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_in_bfloat16_are_added_up_in_float32(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = config(monkeypatch, dtype="bfloat16", deepspeed={"stage": stage})
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert found["communication_data_type"] == "fp32"


def test_offload_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed = {"stage": 3, "offload_optimizer": True, "offload_parameters": True}
    found = config(monkeypatch, deepspeed=deepspeed, optimizer={"type": "cpu_adam"})
    zero = found["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"]) == (3, "cpu")
    assert zero["offload_param"]["device"] == "cpu"
    assert (
        "offload_optimizer" not in config(monkeypatch, deepspeed={"stage": 3})["zero_optimization"]
    )


def test_a_finite_norm_is_returned() -> None:
    assert grad_norm(Engine(0.25)) == 0.25


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0])
def test_a_step_that_deepspeed_left_out_is_an_error(norm: float) -> None:
    with pytest.raises(NonFiniteLossError, match="not finite"):
        grad_norm(Engine(norm))
