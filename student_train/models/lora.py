"""Low-rank adapters of a student: put in before training, written and merged after it.

peft's layers are put into the model itself, without its wrapper: ``language_model`` stays the model
that it was, with frozen weights and adapters beside them.
"""

from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from storage.fingerprint import ADAPTER_WEIGHTS
from student_train.errors import PreflightError
from student_train.models.lora_config import LoraConfig

ADAPTER = "default"
"""Name of the one adapter, as peft calls it where nobody does."""

PEFT_PREFIX = "base_model.model."
"""Where peft's wrapper has the model, and so how names of weights begin in its files."""


def add_adapters(language_model: Any, lora: LoraConfig) -> None:
    """Put adapters into a model, which changes nothing about its output yet, and freeze the rest.

    Raises:
        PreflightError: if a named layer is missing, or is the embedding of a model that has one for
            both ends.
    """
    adapted = _adapted_layers(language_model, lora)
    config = PeftConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it by r
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=sorted(adapted),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in adapted.values()),
    )
    inject_adapter_in_model(config, language_model, ADAPTER)


def _adapted_layers(language_model: Any, lora: LoraConfig) -> dict[str, nn.Module]:
    """The layers that get adapters, by their full names."""
    ends = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
    linear = {
        name: module
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    }
    if lora.target_modules == "all_linear":
        found = {
            name: module
            for name, module in linear.items()
            if module is not ends[1] and not isinstance(module, nn.Embedding)
        }
    else:
        found = {}
        for wanted in lora.target_modules:
            named = {n: m for n, m in linear.items() if n == wanted or n.endswith(f".{wanted}")}
            if not named:
                known = sorted({name.rpartition(".")[2] for name in linear})
                raise PreflightError(
                    f"train.lora.target_modules names {wanted!r}, which is no linear layer of "
                    f"{type(language_model).__name__}; it has {', '.join(known)}"
                )
            found.update(named)
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    if tied and any(module in ends for module in found.values()):
        raise PreflightError(
            f"train.lora.target_modules names an embedding of {type(language_model).__name__}, "
            "which uses one weight at both ends, where an adapter would change one of them; adapt "
            "other layers"
        )
    return found


def save_adapter(
    language_model: Any, weights: dict[str, Tensor], directory: Path, *, base: str
) -> None:
    """Write an adapter as peft does.

    Args:
        language_model: The model that has it.
        weights: What was trained, by its names in the model's state dict.
        directory: An empty one.
        base: The model that it belongs to: a directory or a name.
    """
    state = get_peft_model_state_dict(language_model, weights, ADAPTER, save_embedding_layers=False)
    named = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in state.items()}
    save_file(named, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy(language_model.peft_config[ADAPTER])
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(directory)


def merged_weights(base: Any, adapter: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of a model with its adapter merged into its weights.

    Args:
        base: The untrained model, in float32; it is used up.
        adapter: Directory of the adapter.
        dtype: Of the result; sums are made in that of the base.
    """
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    weights: dict[str, Tensor] = merged.to(dtype).state_dict()
    return weights
