"""Settings of watching a training, and of what is decided by watching it. No torch import here."""

from typing import Literal

from pydantic import Field

from storage.config import Config

HeldoutMetric = Literal[
    "kl", "reverse_kl", "cross_entropy", "agreement", "topk_overlap", "student_entropy"
]
"""What is measured on held-out labels."""

SelectionMetric = Literal["kl", "reverse_kl", "cross_entropy", "agreement", "topk_overlap"]
"""Held-out metrics of which one end is better."""

HIGHER_IS_BETTER: frozenset[str] = frozenset({"agreement", "topk_overlap"})

TEACHER_FORCED_KL: frozenset[str] = frozenset({"kl", "reverse_kl"})
"""Metrics that favour soft labels."""

TrackerName = Literal["wandb", "mlflow"]


class WatchConfig(Config):
    """Where metrics go beside ``metrics.jsonl`` and TensorBoard; never part of a student's key."""

    trackers: tuple[TrackerName, ...] = ()
    """Services that get the metrics too: ``wandb``, ``mlflow``. Their packages are installed by
    hand; addresses and credentials come from their own environment variables."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak of one device in 1e12 floating-point operations per second at ``dtype``, for the model
    FLOPs utilisation. Unset, it is looked up for known GPUs in bfloat16; of others the utilisation
    is left out."""


class HeldoutConfig(Config):
    """Evaluation during the training on the held-out prompts of the project.

    It changes nothing about the steps, and enters the student's key only where ``best`` or
    ``early_stop`` looks at it.
    """

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between evaluations; one more follows the last step. Unset, there are none."""
    samples: int = Field(default=64, ge=1)
    """Held-out samples that are measured, the first ones of the selection."""
    generations: int = Field(default=2, ge=0)
    """Held-out prompts that are answered greedily at every evaluation."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Length limit of these answers."""


class BestConfig(Config):
    """Which of the evaluated students is exported, in place of the last one."""

    metric: SelectionMetric
    """Held-out metric. ``kl`` and ``reverse_kl`` are taken on the teacher's own tokens and favour
    soft labels: see training.md, "Watching"."""


class EarlyStopConfig(Config):
    """When a training ends before its last step."""

    metric: SelectionMetric
    """Held-out metric, as in ``best``."""
    patience: int = Field(default=3, ge=1)
    """Evaluations in a row without an improvement after which it ends."""
    min_delta: float = Field(default=0.0, ge=0)
    """An improvement is a change by more than this, in the unit of the metric."""
