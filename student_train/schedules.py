"""What depends on the step alone: pure functions of it, with nothing to checkpoint or to lose."""

import math
from dataclasses import dataclass

from student_train.config import OptimizerConfig


@dataclass(frozen=True, slots=True)
class StepState:
    """Where a training stands: what losses and weights may know of time."""

    step: int
    """Finished optimiser steps."""
    total_steps: int
    """Optimiser steps of the whole training."""
    t: float | None = None
    """TAID's interpolation parameter; None for other losses."""

    @property
    def schedule(self) -> dict[str, float]:
        """The quantities of this step that divergences ask for by name.

        ``progress`` runs from 0 at the first step to 1 at the last.
        """
        progress = self.step / max(1, self.total_steps - 1)
        return {"progress": progress} if self.t is None else {"progress": progress, "t": self.t}


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of step ``step`` (from 0) of ``total_steps``.

    Source of ``wsd``: MiniCPM (Hu et al. 2024), with a linear decay.
    """
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "wsd": min(1.0, (1.0 - progress) / config.decay_ratio),
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.min_lr_ratio
    return config.lr * (floor + (1.0 - floor) * decay)
