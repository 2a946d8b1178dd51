r"""How much memory a training takes on each rank, from shapes alone.

What the training *state* takes is known: with P parameters, of which T are trained, on N ranks, and
d bytes per number in ``train.dtype``,

| part | bytes | divided by N from stage | source |
|---|---|---|---|
| weights | d P | 3 | |
| gradients | d T | 2 | |
| float32 copies of weights and gradients, where DeepSpeed keeps them | 4 T each | 1 | |
| moments of AdamW | 8 T | 1 | |

(ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1 and figure 1: 2 + 2 + K bytes per
parameter with K = 12 in mixed precision; K holds the moments and the copy of the weights.)

*Activations* are estimated. A layer keeps for the backward pass, per token, the inputs of its
products, norms and functions (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1, counts them
for one kernel per step; models of transformers keep more, which was counted with
``torch.autograd.graph.saved_tensors_hooks`` for Llama, Gemma 2 and GPT-2):

.. math:: a = 7 H + 3 A + 3 A' + g I

numbers, with hidden size H, widths A of the queries and A' of the keys, width I of the feed-forward
part, and g = 4 with a gate and 5 without, whose GELU is written out. Attention scores are not
kept: ``sdpa`` makes them anew. Norms keep two more copies of H in float32 where ``train.dtype`` is
another. One layer more is reckoned for what comes and goes in the backward pass. With activation
checkpointing a layer keeps H numbers, and one layer at a time has all of them. The loss needs the
logits of one chunk of rows and the gradients of hidden states and output embedding.

The whole was within 15 % of the peak of small Llama trainings on CPU, and half too low for GPT-2.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from student_train.config import TrainConfig
from student_train.losses.head_chunks import CHUNK_ROWS

GATE_NAMES = ("gate_proj", "gate_up_proj", "w3")
"""Modules by which a feed-forward part with a gate is known."""

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What memory depends on, of a model."""

    num_parameters: int
    """A tensor that is used twice counts once."""
    num_layers: int
    hidden_size: int
    query_size: int
    """Width of all queries together."""
    key_size: int
    """Width of all keys together."""
    feed_forward_size: int
    """Width of the feed-forward part; of a mixture of experts, of those that a token passes."""
    has_gate: bool
    vocab_rows: int
    """Rows of the output embedding."""
    linear_widths: Mapping[str, int] = field(default_factory=dict)
    """Inputs plus outputs of all linear layers that have a name, such as ``q_proj``, added up; the
    output embedding is left out."""


@dataclass(frozen=True, slots=True)
class TrainingShape:
    """What memory depends on, of a training."""

    dtype: torch.dtype
    micro_tokens: int
    world_size: int = 1
    stage: int = 0
    """ZeRO stage."""
    num_trained: int | None = None
    """Parameters that are trained, None for all."""
    offloads_optimizer: bool = False
    """Whether moments and float32 copies are in the memory of the host."""
    offloads_parameters: bool = False
    """Whether the weights of stage 3 are there too."""
    checkpoints_activations: bool = False


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that a rank needs."""

    device: dict[str, int]
    """On the device, by part."""
    host: dict[str, int]
    """In the memory of the host, by part."""

    def total(self, *, on_host: bool) -> int:
        """Bytes in one place; a device that is the host holds both.

        Args:
            on_host: Whether the device is the CPU.
        """
        return sum(self.device.values()) + (sum(self.host.values()) if on_host else 0)

    def fixed(self, *, on_host: bool) -> int:
        """Those of the training state, which no smaller batch lowers."""
        parts = {**self.device, **self.host} if on_host else self.device
        return sum(size for name, size in parts.items() if name in STATE)


STATE = ("weights", "gradients", "float32 copies", "moments")
"""Parts of the training state."""


def model_shape(directory: Path) -> ModelShape:
    """The shape of a model directory; no weights are read.

    Raises:
        ValueError: if transformers does not know the architecture.
    """
    config: Any = AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text: Any = config.get_text_config()
    hidden = int(text.hidden_size)
    heads = _number(text, "num_attention_heads", 1)
    head_size = _number(text, "head_dim", hidden // heads)
    width = _number(text, "intermediate_size", _number(text, "n_inner", 4 * hidden))
    experts = _number(text, "num_experts_per_tok", 1)
    output = model.get_output_embeddings()
    widths: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output:
            widths[name.rpartition(".")[2]] += sum(module.weight.shape)
    return ModelShape(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=int(text.num_hidden_layers),
        hidden_size=hidden,
        query_size=heads * head_size,
        key_size=_number(text, "num_key_value_heads", heads) * head_size,
        feed_forward_size=experts * _number(text, "moe_intermediate_size", width),
        has_gate=any(name in GATE_NAMES for name in _names(model)),
        vocab_rows=int(output.weight.shape[0]),
        linear_widths=dict(widths),
    )


def training_shape(train: TrainConfig, model: ModelShape, world_size: int) -> TrainingShape:
    """What the memory of a training depends on."""
    num_trained = None
    if train.lora is not None:
        targets = train.lora.target_modules
        every = targets == "all_linear"
        names = [name for name in model.linear_widths if every or name in targets]
        num_trained = train.lora.r * sum(model.linear_widths[name] for name in names)
    return TrainingShape(
        dtype=torch.bfloat16 if train.dtype == "bfloat16" else torch.float32,
        micro_tokens=min(train.batch.micro_tokens, train.batch.tokens),
        world_size=world_size,
        stage=train.deepspeed.stage,
        num_trained=num_trained,
        offloads_optimizer=train.deepspeed.offload_optimizer,
        offloads_parameters=train.deepspeed.offload_parameters,
        checkpoints_activations=train.activation_checkpointing,
    )


def estimate_memory(model: ModelShape, training: TrainingShape) -> MemoryEstimate:
    """Bytes per rank; formulas and sources are in the docstring of this module."""
    size = training.dtype.itemsize
    trained = model.num_parameters if training.num_trained is None else training.num_trained
    shards = [training.world_size if training.stage >= stage else 1 for stage in range(4)]
    has_copies = training.stage > 0 or size < FLOAT32_BYTES
    weights = size * model.num_parameters // shards[3]
    kept_by_optimizer = {
        "float32 copies": 2 * FLOAT32_BYTES * trained // shards[1] if has_copies else 0,
        "moments": 2 * FLOAT32_BYTES * trained // shards[1],
    }
    device = {
        "weights": weights,
        "gradients": size * trained // shards[2],
        **kept_by_optimizer,
        "activations": _activation_bytes(model, training),
        "loss": _loss_bytes(model, training),
    }
    moved = [*kept_by_optimizer] if training.offloads_optimizer else []
    moved += ["weights"] if training.offloads_parameters else []
    host = {name: device.pop(name) for name in moved}
    return MemoryEstimate(device, host)


def _names(model: torch.nn.Module) -> set[str]:
    return {part for name, _ in model.named_parameters() for part in name.split(".")}


def _activation_bytes(model: ModelShape, training: TrainingShape) -> int:
    """What all layers keep of a micro-batch, and the embeddings before them."""
    size, hidden = training.dtype.itemsize, model.hidden_size
    numbers = (
        7 * hidden
        + 3 * model.query_size
        + 3 * model.key_size
        + (4 if model.has_gate else 5) * model.feed_forward_size
    )
    layer = size * numbers + (0 if size == FLOAT32_BYTES else 2 * FLOAT32_BYTES * hidden)
    kept = layer * model.num_layers
    if training.checkpoints_activations:
        kept = size * hidden * model.num_layers + layer
    return training.micro_tokens * (kept + layer + 2 * size * hidden)


def _loss_bytes(model: ModelShape, training: TrainingShape) -> int:
    """Logits of a chunk of rows with a float32 copy, and the gradients that the loss makes."""
    size = training.dtype.itemsize
    rows = min(CHUNK_ROWS, training.micro_tokens)
    logits = rows * model.vocab_rows * (size + FLOAT32_BYTES)
    hidden = training.micro_tokens * model.hidden_size * 2 * size
    return logits + hidden + FLOAT32_BYTES * model.vocab_rows * model.hidden_size


def _number(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return default if value is None else int(value)
