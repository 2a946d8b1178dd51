"""From the config of a divergence to what a loss kernel calls.

The kernel's side of the contract is in the docstring of ``student_train/losses/base.py``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from student_train.losses import DIVERGENCES
from student_train.losses.base import NEG_INF, Divergence, TeacherRows, load
from student_train.losses.config import DivergenceConfig, LinearTemperature, TailTreatment
from student_train.losses.sampled_kl import head_categories, sampled_terms
from student_train.losses.tail import emptied, renormalised
from student_train.losses.temperature import teacher_categories_at


@dataclass(frozen=True, slots=True)
class SoftTerm:
    """A divergence with its options bound, and what a kernel has to know about it."""

    divergence: Divergence
    """On the categories of :meth:`teacher_categories`."""
    tail: TailTreatment = "bucket"
    """What becomes of the tokens outside the stored ones."""
    temperature: float = 1.0
    """Softens both sides: the kernel compares softmax(logits / temperature)."""
    scale: float = 1.0
    """Factor on value and gradient: 1, or the square of the temperature."""

    @property
    def sampled(self) -> bool:
        """Whether :meth:`sample_terms` has to be added."""
        return self.tail == "sampled"

    def teacher_categories(self, rows: TeacherRows, dtype: torch.dtype) -> Tensor:
        """The teacher's side, [M, C] log-probs at the temperature.

        Raises:
            PreflightError: if the labels lack power sums that the temperature needs.
        """
        if self.sampled:
            return head_categories(rows, dtype)
        if self.temperature != 1 and self.tail in ("renorm", "zero"):
            # what is renormalised over the stored tokens needs no power sum
            stored_MK = rows.stored(dtype) / self.temperature
            return torch.nn.functional.pad(stored_MK, (0, 1), value=NEG_INF)
        return teacher_categories_at(rows, self.temperature, dtype)

    def __call__(self, teacher_MC: Tensor, student_MC: Tensor) -> tuple[Tensor, Tensor]:
        """Value, float[M], and derivative with respect to ``student_MC``, float[M, C]."""
        value_M, gradient_MC = self.divergence(teacher_MC, student_MC)
        if self.scale == 1.0:
            return value_M, gradient_MC
        return self.scale * value_M, self.scale * gradient_MC

    def sample_terms(self, rows: TeacherRows, student_MS: Tensor) -> tuple[Tensor, Tensor]:
        """Value of the sampled part, float[M], and derivative by ``student_MS``, float[M, S].

        Args:
            rows: Teacher labels.
            student_MS: The student's log-probs at ``rows.tail_ids_MS``; anything where unused.

        Raises:
            PreflightError: if the rows hold no samples.
        """
        return sampled_terms(rows, student_MS)


def as_soft_term(divergence: Divergence) -> SoftTerm:
    """A plain divergence as a :class:`SoftTerm` with nothing set; a ``SoftTerm`` as it is."""
    return divergence if isinstance(divergence, SoftTerm) else SoftTerm(divergence)


def make_divergence(
    config: DivergenceConfig, *, schedule: Mapping[str, float] | None = None
) -> SoftTerm:
    """Bind a config, and what changes from step to step, to a divergence.

    Args:
        config: Which divergence, with its options.
        schedule: Quantities of this optimiser step: ``t`` of TAID, ``progress`` of the run for a
            temperature that moves, from 0 to 1. Entries that the config does not use are ignored.

    Raises:
        ValueError: if the config needs an entry that ``schedule`` lacks.
    """
    steps = schedule or {}
    options = config.options()
    options |= {name: _scheduled(name, steps, config) for name in config.scheduled}
    function = cast(Callable[..., tuple[Tensor, Tensor]], load(DIVERGENCES[config.type]))
    divergence: Divergence = partial(function, **options)
    temperature = config.temperature
    if isinstance(temperature, LinearTemperature):
        temperature = temperature.at(_scheduled("progress", steps, config))
    if config.tail == "renorm":
        divergence = renormalised(divergence)
    elif config.tail == "zero":
        divergence = emptied(divergence)
    scale = temperature**2 if config.temperature_squared else 1.0
    return SoftTerm(divergence, config.tail, temperature, scale)


def _scheduled(name: str, schedule: Mapping[str, float], config: DivergenceConfig) -> float:
    if name not in schedule:
        raise ValueError(
            f"{config.type} needs {name!r} of the current step; the schedule holds "
            f"{sorted(schedule)}"
        )
    return schedule[name]
