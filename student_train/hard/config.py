"""Options of the hard side, with the published defaults. No torch import here."""

from typing import Annotated, Literal

from pydantic import Field

from storage.config import Config
from student_train.sections import short_form

HardLabel = Literal["sampled", "argmax", "dataset", "random"]
"""Which token is the hard label."""


class HardTermOptions(Config):
    """What every hard term says about itself."""

    type: str


class CrossEntropyConfig(HardTermOptions):
    """Minus the student's log-prob of the hard label."""

    type: Literal["cross_entropy"] = "cross_entropy"


class RiskGuidedConfig(HardTermOptions):
    """Cross-entropy that also looks one token ahead (Bridge-Garden, the best variant there)."""

    type: Literal["risk_guided"] = "risk_guided"
    alpha: float = Field(default=0.05, gt=0)
    """Strength of the chi-square term. 0.05 is the authors' release; their paper names 0.1."""
    gamma: float = Field(default=0.9999, gt=0, le=1)
    """Discount of the next token's value and of later positions."""


HardTermConfig = Annotated[
    Annotated[CrossEntropyConfig | RiskGuidedConfig, Field(discriminator="type")],
    short_form("cross_entropy"),
]
"""Which hard term, and its options."""
