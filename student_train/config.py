"""Settings of student training and evaluation. No torch import here."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from storage.config import Config

METRICS_FILE = "metrics.jsonl"
"""One line per optimiser step, in the output directory of a training."""

MODEL_DIRECTORY = "model"
"""The exported student, in the output directory of a training."""

HardLabel = Literal["sampled", "argmax", "dataset"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class StaticWeightConfig(Config):
    """The same soft weight for every token."""

    type: Literal["static"] = "static"
    soft_weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the soft term: 0 is cross-entropy on hard labels only, 1 is pure soft labels."""


WeightConfig = StaticWeightConfig


class HybridLossConfig(Config):
    """Soft and hard labels blended token by token (Bridge-Garden, ICML 2026)."""

    type: Literal["hybrid"] = "hybrid"
    soft: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    """Divergence between teacher and student on the k+1 categories (top-k and tail).
    ``forward_kl`` covers the teacher's modes, ``reverse_kl`` seeks one of them."""
    weight: WeightConfig = StaticWeightConfig()
    """How soft and hard terms are weighted."""
    hard: HardLabel = "sampled"
    """Hard label: the token the teacher ``sampled``, its ``argmax``, or the token of the
    ``dataset`` (only with labels made in score mode)."""


LossConfig = HybridLossConfig


class OptimizerConfig(Config):
    """AdamW with a warm-up and a decay."""

    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up, down to ``min_lr_ratio * lr``."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps during which the learning rate rises linearly from 0."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step relative to the peak."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the moment estimates."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, applied to all parameters."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""


class BatchConfig(Config):
    """How samples become optimiser steps; the grouping is the same for every world size."""

    tokens: int = Field(default=131072, ge=1)
    """Tokens (prompt and response) of one optimiser step, over all ranks."""
    micro_tokens: int = Field(default=8192, ge=1)
    """Tokens, padding included, that go through the model at once; lower it when memory runs
    out. It does not change the result beyond rounding."""


class DeepSpeedConfig(Config):
    """How DeepSpeed shards the training state."""

    stage: Literal[0, 1, 2] = 0
    """ZeRO stage: 0 replicates everything, 1 shards optimiser states, 2 also gradients."""


class PrunedModelConfig(Config):
    """A student made by keeping some layers of another model, renumbered."""

    type: Literal["pruned"] = "pruned"
    of: Literal["teacher"] | str = "teacher"
    """``teacher``, or the path of a Hugging Face model directory."""
    keep_layers: tuple[int, ...] = Field(min_length=1)
    """Layers to keep, in this order."""

    @model_validator(mode="after")
    def _each_layer_once(self) -> "PrunedModelConfig":
        if len(set(self.keep_layers)) != len(self.keep_layers):
            raise ValueError(f"keep_layers {list(self.keep_layers)} names a layer twice")
        return self

    def __str__(self) -> str:
        return f"layers {', '.join(map(str, self.keep_layers))} of {self.of}"


class TrainConfig(Config):
    """Everything that decides what a student becomes.

    All of it enters the student's key: ``model`` by content, and only ``checkpoint_every_steps``
    does not.
    """

    model: str | PrunedModelConfig
    """Directory of the untrained student, or how to make one."""
    loss: LossConfig = HybridLossConfig()
    """Objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimiser and learning-rate schedule."""
    batch: BatchConfig = BatchConfig()
    """Batch sizes."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the selection."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the forward and backward pass; master weights are float32 in both cases."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Sharding of the training state."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of samples in every epoch."""
    checkpoint_every_steps: int = Field(default=200, ge=1)
    """Steps between checkpoints; a crash repeats at most this many steps."""


class EvaluateConfig(Config):
    """What is measured on the held-out prompts."""

    metrics: tuple[Literal["kl", "cross_entropy", "agreement"], ...] = (
        "kl",
        "cross_entropy",
        "agreement",
    )
    """``kl``: KL(teacher, student) on the k+1 categories, nats per token; ``cross_entropy``: of
    the hard labels, nats per token; ``agreement``: share of equal argmax tokens."""
    generations: int = Field(default=4, ge=0)
    """Held-out prompts that every student answers greedily, shown side by side in the report."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Length limit of these answers."""
    micro_tokens: int = Field(default=8192, ge=1)
    """Tokens, padding included, that go through the model at once."""


class LabelSource(Config):
    """The cached labels that a job reads."""

    store: str
    """URI of the label store."""
    label_set: str
    """Label set key."""
    selection: str
    """Key of the selection: exactly these samples, whatever the set holds later."""


class TrainJob(Config):
    """One training of one student, as plain data that can be sent to another process."""

    labels: LabelSource
    model: str
    """Directory of the untrained student."""
    tokenizer: str
    """Directory of the teacher's tokenizer, against which the cached ids are checked."""
    train: TrainConfig
    output: str
    """Directory of the run; gets ``metrics.jsonl``, ``checkpoints/``, ``model/``."""
    card: dict[str, str] = Field(default_factory=dict)
    """Provenance for the model card."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each process."""


class EvaluateJob(Config):
    """One evaluation of one model on held-out labels."""

    labels: LabelSource
    model: str
    """Directory of the model."""
    evaluate: EvaluateConfig
    output: str
    """File that gets the result as JSON."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the process."""
