"""Options of the weight policies: one class each, with the published defaults. No torch import.

Formulas and sources are in ``docs/weights.md``.
"""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from storage.config import Config
from student_train.sections import short_form

POWER_SUM_COLUMNS: Final = {
    0.1: "power_sum_10",
    0.25: "power_sums",
    0.5: "power_sums",
    0.75: "power_sums",
}
"""Label column that holds the power sum of an exponent."""

Share = Annotated[float, Field(ge=0, le=1)]


class WeightPolicyConfig(Config):
    """What every weight policy says about itself."""

    type: str

    @property
    def needs_hard_label_probability(self) -> bool:
        """Whether the weight depends on the teacher's probability of the hard label."""
        return False

    @property
    def required_columns(self) -> frozenset[str]:
        """Optional label columns that the weight is computed from, as in ``label.columns``."""
        return frozenset()


class StaticWeightConfig(WeightPolicyConfig):
    """The same soft weight for every token."""

    type: Literal["static"] = "static"
    soft_weight: Share = 0.5
    """Share of the soft term: 0 is cross-entropy on hard labels only, 1 is pure soft labels."""


class ConfidenceWeightConfig(WeightPolicyConfig):
    """Soft labels where the teacher is unsure: one minus a probability of the teacher."""

    type: Literal["confidence"] = "confidence"
    of: Literal["max", "label"] = "max"
    """Whose probability: of the teacher's likeliest token (``max``, the paper), or of the hard
    ``label`` (the authors' release)."""
    reverse: bool = False
    """Control: soft labels where the teacher is sure."""

    @property
    def needs_hard_label_probability(self) -> bool:
        """Whether the weight depends on the teacher's probability of the hard label."""
        return self.of == "label"


class EntropyWeightConfig(WeightPolicyConfig):
    """Soft labels where the teacher's distribution is spread out."""

    type: Literal["entropy"] = "entropy"
    measure: Literal["shannon", "power_sum"] = "shannon"
    """``shannon``: the entropy over its largest value, log V (the paper); weights are small on
    language, where most tokens are nearly certain. ``power_sum``: the sum of p**gamma, scaled to
    0 for a one-hot and 1 for a uniform distribution (the authors' release); weights are much
    larger, for the tail dominates the sum."""
    gamma: float = 0.1
    """Exponent of the power sum. 0.1 needs the label column ``power_sum_10``; 0.25, 0.5 and 0.75
    need ``power_sums``."""
    scale_nats: float | None = Field(default=None, gt=0)
    """Entropy in nats that counts as 1, with everything above; ``shannon`` only. Unset, it is
    log V. A value near the largest entropies of the data spreads the weights over 0 to 1."""
    reverse: bool = False
    """Control: one minus the weight."""

    @model_validator(mode="after")
    def _options_of_the_measure(self) -> Self:
        if self.gamma not in POWER_SUM_COLUMNS:
            known = ", ".join(map(str, POWER_SUM_COLUMNS))
            raise ValueError(f"gamma {self.gamma:g} is stored by no label column; use {known}")
        if self.measure == "shannon" and self.gamma != 0.1:
            raise ValueError("gamma belongs to measure 'power_sum'; remove it or set the measure")
        if self.measure != "shannon" and self.scale_nats is not None:
            raise ValueError("scale_nats belongs to measure 'shannon'; remove it")
        return self

    @property
    def required_columns(self) -> frozenset[str]:
        """Optional label columns that the weight is computed from, as in ``label.columns``."""
        if self.measure == "shannon":
            return frozenset({"entropy"})
        return frozenset({POWER_SUM_COLUMNS[self.gamma]})


class AmbiguityWeightConfig(WeightPolicyConfig):
    """Soft labels where the teacher's likeliest token is weak among all possible ones."""

    type: Literal["ambiguity"] = "ambiguity"
    soft_weight: Share = 0.5
    """Soft weight of a uniform row; the paper searches it from 0.1 to 0.9."""


class CurriculumWeightConfig(WeightPolicyConfig):
    """Hard labels first: the soft weight of all tokens rises from 0 over the first steps."""

    type: Literal["curriculum"] = "curriculum"
    soft_weight: Share = 0.2
    """Soft weight after the ramp."""
    warmup_ratio: Share = 0.2
    """Length of the ramp as a share of all optimiser steps."""
    reverse: bool = False
    """Control: soft labels first, falling from 1 to ``soft_weight``."""


class WslWeightConfig(WeightPolicyConfig):
    """Soft labels where the student knows less of the hard label than the teacher does.

    The hard term keeps the weight 1.
    """

    type: Literal["wsl"] = "wsl"
    soft_weight: Share = 0.2
    """Largest soft weight."""
    reverse: bool = False
    """Control: soft labels where the student knows more."""

    @property
    def needs_hard_label_probability(self) -> bool:
        """Whether the weight depends on the teacher's probability of the hard label."""
        return True


class SidecarWeightConfig(WeightPolicyConfig):
    """Soft weights that somebody computed for every label row and stored as a sidecar."""

    type: Literal["sidecar"] = "sidecar"
    sidecar: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Key of the sidecar, beside the label set."""
    column: str = "soft_weight"
    """Its column; every value lies in 0 to 1."""
    reverse: bool = False
    """One minus the column."""


WeightConfig = Annotated[
    Annotated[
        StaticWeightConfig
        | ConfidenceWeightConfig
        | EntropyWeightConfig
        | AmbiguityWeightConfig
        | CurriculumWeightConfig
        | WslWeightConfig
        | SidecarWeightConfig,
        Field(discriminator="type"),
    ],
    short_form("static"),
]
"""Which weight policy, and its options."""
