"""Context length and memory, by formulas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from student_train.config import TrainConfig
from student_train.models.memory import (
    ModelShape,
    TrainingShape,
    estimate_memory,
    model_shape,
    training_shape,
)
from student_train.preflight.room import (
    Memory,
    Ranks,
    check_context,
    check_memory,
    context_of,
    free_host_bytes,
)
from tests.unit.student_train.preflight_models import FAMILIES, save_model, subject_of

BILLION = 10**9
SHAPE = ModelShape(
    num_parameters=BILLION,
    num_layers=10,
    hidden_size=100,
    query_size=100,
    key_size=50,
    feed_forward_size=400,
    has_gate=True,
    vocab_rows=1000,
)


def state(**training: Any) -> dict[str, float]:
    """Bytes per parameter of the training state on the device."""
    settings = {"dtype": torch.bfloat16, "micro_tokens": 1, **training}
    parts = estimate_memory(SHAPE, TrainingShape(**settings)).device
    return {name: size / BILLION for name, size in parts.items() if size >= BILLION // 100}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, {"weights": 2, "gradients": 2, "float32 copies": 8, "moments": 8}),
        (1, {"weights": 2, "gradients": 2, "float32 copies": 2, "moments": 2}),
        (2, {"weights": 2, "gradients": 0.5, "float32 copies": 2, "moments": 2}),
        (3, {"weights": 0.5, "gradients": 0.5, "float32 copies": 2, "moments": 2}),
    ],
)
def test_stages_of_zero_divide_what_they_should(stage: int, expected: dict[str, float]) -> None:
    assert state(world_size=4, stage=stage) == expected


def test_float32_needs_no_second_copy_without_sharding() -> None:
    assert state(dtype=torch.float32) == {"weights": 4, "gradients": 4, "moments": 8}


def test_adapters_have_small_gradients_and_moments() -> None:
    expected = {"weights": 2, "gradients": 0.2, "float32 copies": 0.8, "moments": 0.8}
    assert state(num_trained=BILLION // 10) == expected


def test_what_is_offloaded_is_on_the_host() -> None:
    training = TrainingShape(
        torch.bfloat16,
        micro_tokens=1,
        world_size=2,
        stage=3,
        offloads_optimizer=True,
        offloads_parameters=True,
    )
    estimate = estimate_memory(SHAPE, training)
    assert estimate.fixed(on_host=False) == BILLION  # gradients
    assert estimate.fixed(on_host=True) == (2 + 2 + 8 + 8) * BILLION // 2
    assert set(estimate.host) == {"weights", "float32 copies", "moments"}


def test_activations_follow_the_formula() -> None:
    """7 H + 3 A + 3 A' + 4 I = 700 + 300 + 150 + 1600 numbers of a layer, and one layer more."""
    training = TrainingShape(torch.float32, micro_tokens=7)
    per_token = 4 * (2750 * 11 + 2 * 100)
    assert estimate_memory(SHAPE, training).device["activations"] == 7 * per_token
    checkpointed = TrainingShape(torch.float32, micro_tokens=7, checkpoints_activations=True)
    per_token = 4 * (100 * 10 + 2 * 2750 + 2 * 100)
    assert estimate_memory(SHAPE, checkpointed).device["activations"] == 7 * per_token


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_of_a_model_is_that_of_its_weights(tmp_path: Path, family: str) -> None:
    directory = save_model(tmp_path / "model", family)
    shape = model_shape(directory)
    built: Any = AutoModelForCausalLM.from_config(FAMILIES[family].from_pretrained(directory))
    assert shape.num_parameters == sum(p.numel() for p in built.parameters())
    assert shape.vocab_rows == 262
    assert (shape.num_layers, shape.hidden_size, shape.query_size) == (2, 16, 16)
    assert shape.key_size == (8 if family in ("qwen", "gemma") else 16)
    assert shape.feed_forward_size == (64 if family == "gpt2" else 24)
    assert shape.has_gate == (family != "gpt2")


def test_settings_decide_what_is_trained_and_kept(tmp_path: Path) -> None:
    shape = model_shape(save_model(tmp_path / "model"))
    # two layers: four square products of attention, three between 16 and 24
    widths = {"q_proj": 64, "down_proj": 80}
    assert {name: shape.linear_widths[name] for name in widths} == widths
    settings = {
        "model": "m",
        "lora": {"r": 4},
        "deepspeed": {"stage": 3, "offload_optimizer": True},
        "activation_checkpointing": True,
        "optimizer": {"type": "cpu_adam"},
    }
    training = training_shape(TrainConfig.model_validate(settings), shape, 3)
    assert training.num_trained == 4 * (4 * 64 + 3 * 80)
    assert (training.world_size, training.stage, training.offloads_optimizer) == (3, 3, True)
    assert (training.offloads_parameters, training.checkpoints_activations) == (False, True)
    few = TrainConfig.model_validate({**settings, "lora": {"r": 4, "target_modules": ["q_proj"]}})
    assert training_shape(few, shape, 3).num_trained == 4 * 64


def test_adapters_of_conv_layers_are_counted(tmp_path: Path) -> None:
    shape = model_shape(save_model(tmp_path / "model", "gpt2"))
    assert shape.linear_widths["c_attn"] == 2 * (16 + 48)
    assert "lm_head" not in shape.linear_widths


def test_memory_is_refused_only_where_the_training_state_does_not_fit() -> None:
    train = TrainConfig.model_validate({"model": "m", "batch": {"micro_tokens": 100000}})

    def verdict(num_bytes: float) -> str:
        return check_memory(SHAPE, train, Ranks(1, Memory(int(num_bytes), on_host=True))).verdict

    state_bytes = 20 * BILLION
    total = estimate_memory(SHAPE, TrainingShape(torch.bfloat16, micro_tokens=100000))
    everything = total.total(on_host=True)
    assert everything > state_bytes
    assert verdict(state_bytes - 1) == "refused"
    assert verdict(state_bytes) == "warning"
    assert verdict(everything / 0.9 - 1000) == "warning"
    assert verdict(everything * 2 + 2**31) == "ok"
    elsewhere = check_memory(SHAPE, train, Ranks(1, None))
    assert (elsewhere.verdict, "weights 1.9 GiB" in elsewhere.sentence) == ("unknown", True)


def test_a_machine_has_free_memory() -> None:
    assert 2**20 < free_host_bytes() < 2**50


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, 64),
        ("gpt2", {}, 64),
        ("gemma", {}, 64),  # a sliding window of 8 is no limit
        (
            "qwen",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            256,
        ),
    ],
)
def test_the_context_is_what_a_model_can_attend_to(
    tmp_path: Path, family: str, changes: dict[str, Any], expected: int
) -> None:
    assert context_of(save_model(tmp_path / "model", family, changes=changes)) == expected


def test_a_model_without_positions_has_no_limit(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model")
    (directory / "config.json").write_text(
        json.dumps({"model_type": "bloom", "vocab_size": 300, "hidden_size": 16})
    )
    found = check_context(subject_of(directory, directory), 10**6, is_certain=False)
    assert (found.verdict, "no limit" in found.sentence) == ("ok", True)
