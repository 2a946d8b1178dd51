"""Options of the divergences: one class each, with the published defaults. No torch import here.

A divergence may be written as its name: ``soft: jsd`` means ``soft: {type: jsd}``. What it needs
from the cache beyond top-k and tail mass is :func:`required_columns`; formulas and sources are in
``docs/losses.md``.
"""

import math
from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import Field, TypeAdapter, field_validator, model_validator

from storage.config import Config
from student_train.sections import short_form

TailTreatment = Literal["bucket", "renorm", "zero", "sampled"]

TAIL_SAMPLES: Final = "tail_samples"
"""What :func:`required_columns` calls a column of samples, of whatever kind."""

INTERPOLATED: Final = (0.25, 1.0)
"""Exponents 1/T between which power sums are interpolated: temperatures from 1 to 4."""

LogFloor = Annotated[float, Field(lt=0, ge=-1000)]


def stored_power(alpha: float) -> str | None:
    """Name of the stored power sum with this exponent (``"50"`` for 0.5), None if there is none."""
    from storage.columns import POWERS  # pyarrow: a config of temperature 1 does without it

    names = [name for name, power in POWERS.items() if math.isclose(power, alpha, rel_tol=1e-9)]
    return names[0] if names else None


def _check_temperature(temperature: float) -> None:
    alpha = 1 / temperature
    low, high = INTERPOLATED
    if alpha != 1 and stored_power(alpha) is None and not low <= alpha <= high:
        from storage.columns import POWERS

        exact = ", ".join(f"{1 / power:g}" for power in sorted(POWERS.values(), reverse=True))
        raise ValueError(
            f"temperature {temperature:g} needs the power sum at 1/T = {alpha:g}, which no label "
            f"column holds; use one from {1 / high:g} to {1 / low:g}, or one of {exact}"
        )


Temperature = Annotated[float, Field(gt=0)]


class LinearTemperature(Config):
    """A temperature that moves linearly over the steps of a run."""

    start: Temperature
    """At the first step."""
    end: Temperature
    """At the last step."""

    @field_validator("start", "end")
    @classmethod
    def _interpolated(cls, temperature: float) -> float:
        low, high = INTERPOLATED
        if not low <= 1 / temperature <= high:
            raise ValueError(
                f"temperature {temperature:g} cannot be reached step by step; a moving "
                f"temperature stays between {1 / high:g} and {1 / low:g}"
            )
        return temperature

    def at(self, progress: float) -> float:
        """The temperature at a share of the run, 0 at its first step and 1 at its last."""
        return self.start + (self.end - self.start) * progress


class DivergenceConfig(Config):
    """What every divergence can be told."""

    scheduled: ClassVar[tuple[str, ...]] = ()
    """Further arguments of the divergence, which change from step to step."""

    type: str
    tail: TailTreatment = "bucket"
    """How tokens outside the stored ones are compared: ``bucket``, as one category, is right for
    training. ``renorm`` (both renormalised over the stored tokens) and ``zero`` (the teacher
    renormalised, its tail empty) are biased and exist to measure that. ``sampled`` uses stored
    samples, without bias; forward KL only."""
    temperature: Temperature | LinearTemperature = 1.0
    """Softens both distributions in the soft term. Other than 1 needs power sums in the cache."""
    temperature_squared: bool = False
    """Multiply the soft term by the square of the temperature, which keeps its gradient at the
    scale of the hard term's (Hinton et al. 2015)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tail == "sampled" and self.type != "forward_kl":
            raise ValueError(
                f"tail: sampled is unbiased for forward_kl only, not for {self.type}: its value "
                "is not linear in the teacher's probabilities; use tail: bucket"
            )
        if self.tail == "sampled" and self.temperature != 1.0:
            raise ValueError(
                "tail: sampled holds at temperature 1 only, where the samples were drawn; "
                f"got temperature {self.temperature}"
            )
        if self.tail == "bucket" and not isinstance(self.temperature, LinearTemperature):
            _check_temperature(self.temperature)
        return self

    def options(self) -> dict[str, object]:
        """Keyword arguments of the divergence: the fields that its own class adds."""
        return {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name not in DivergenceConfig.model_fields
        }


class ForwardKlConfig(DivergenceConfig):
    """Forward KL: the student covers everything the teacher may say."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKlConfig(DivergenceConfig):
    """Reverse KL (MiniLLM, single-step form): the student avoids what the teacher would not say."""

    type: Literal["reverse_kl"] = "reverse_kl"
    log_floor: LogFloor = -30.0
    """Teacher log-probs below this count as this, nats. Reverse KL is infinite without it where
    the teacher has no mass and the student has some."""


class JsdConfig(DivergenceConfig):
    """Generalised Jensen-Shannon divergence (GKD)."""

    type: Literal["jsd"] = "jsd"
    beta: float = Field(default=0.5, ge=0, le=1)
    """Weight of the teacher in the mixture. 0.5 is the symmetric divergence; near 0 the gradient
    points as that of forward KL, near 1 as that of reverse KL, and vanishes like beta (1 - beta).
    0 is forward KL itself, 1 is reverse KL, as in TRL."""
    log_floor: LogFloor = -30.0
    """Teacher log-probs below this count as this in the reverse KL at ``beta: 1``, nats."""


class SkewForwardKlConfig(DivergenceConfig):
    """Skew forward KL (DistiLLM): from the teacher to a mixture with the student."""

    type: Literal["skew_forward_kl"] = "skew_forward_kl"
    skew: float = Field(default=0.1, ge=0, lt=1)
    """Weight of the teacher in the mixture; 0 is forward KL."""


class SkewReverseKlConfig(DivergenceConfig):
    """Skew reverse KL (DistiLLM): from the student to a mixture with the teacher."""

    type: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    skew: float = Field(default=0.1, gt=0, lt=1)
    """Weight of the student in the mixture; more than 0 keeps the divergence finite."""


class TvdConfig(DivergenceConfig):
    """Total variation distance: half the summed difference of the probabilities."""

    type: Literal["tvd"] = "tvd"


class AdaptiveKlConfig(DivergenceConfig):
    """Forward and reverse KL, weighted by where teacher and student differ (Wu et al. 2025)."""

    type: Literal["adaptive_kl"] = "adaptive_kl"
    head_mass: float = Field(default=0.5, gt=0, le=1)
    """The head of a row are its likeliest tokens up to this mass; the rest is its tail."""
    head: Literal["reach", "within"] = "reach"
    """What the token is that crosses ``head_mass``: ``reach``, the last of the head (the paper),
    or ``within``, the first of the rest (the authors' code). The likeliest token is always head."""
    through_weights: bool = False
    """Let the gradient run through the weights too. The paper's code holds them fixed."""
    log_floor: LogFloor = -30.0
    """Teacher log-probs below this count as this in the reverse KL, nats."""


class EntropyAdaptiveKlConfig(DivergenceConfig):
    """Forward and reverse KL, weighted by which of the two is surer (Bridge-Garden release)."""

    type: Literal["entropy_adaptive_kl"] = "entropy_adaptive_kl"
    sharpness: float = Field(default=0.5, ge=0)
    """How fast the weight moves with the difference of the entropies, per nat; 0 is an even
    mean."""
    through_weights: bool = True
    """Let the gradient run through the weights too, as the release does."""
    log_floor: LogFloor = -30.0
    """Teacher log-probs below this count as this in the reverse KL, nats."""


class AlphaBetaConfig(DivergenceConfig):
    """Alpha-beta divergence (ABKD)."""

    type: Literal["alpha_beta"] = "alpha_beta"
    alpha: float = Field(default=0.2, ge=-2, le=2)
    """Exponent of the teacher. (1, 0) is forward KL and (0, 1) reverse KL; larger values look
    at likelier tokens first."""
    beta: float = Field(default=0.7, ge=-2, le=2)
    """Exponent of the student; larger values look more at tokens where the student is sure."""
    log_floor: LogFloor = -30.0
    """Log-probs below this count as this, nats, but only where an exponent of 0 or less would
    make the divergence infinite."""


class TaidConfig(DivergenceConfig):
    """Cross-entropy to a teacher that starts at the student and moves to the teacher (TAID)."""

    scheduled: ClassVar[tuple[str, ...]] = ("t",)
    type: Literal["taid"] = "taid"
    value: Literal["cross_entropy", "kl"] = "cross_entropy"
    """What is reported and steers the adaptive schedule. ``cross_entropy`` is published; ``kl``
    subtracts the entropy of the interpolated teacher and is 0 at a perfect fit. The gradient is
    the same."""
    log_floor: LogFloor = -30.0
    """Teacher log-probs below this count as this where the student has mass, nats."""


SoftConfig = Annotated[
    Annotated[
        ForwardKlConfig
        | ReverseKlConfig
        | JsdConfig
        | SkewForwardKlConfig
        | SkewReverseKlConfig
        | TvdConfig
        | AdaptiveKlConfig
        | EntropyAdaptiveKlConfig
        | AlphaBetaConfig
        | TaidConfig,
        Field(discriminator="type"),
    ],
    short_form("forward_kl"),
]
"""Which divergence, and its options."""

_ADAPTER: Final[TypeAdapter[DivergenceConfig]] = TypeAdapter(SoftConfig)


def soft_config(value: object) -> DivergenceConfig:
    """A divergence's options out of its name or a mapping, checked and completed.

    Raises:
        pydantic.ValidationError: naming what is wrong.
    """
    return _ADAPTER.validate_python(value)


def required_columns(config: DivergenceConfig) -> set[str]:
    """What the cache must hold for a divergence, beside top-k and tail mass.

    Names as in ``columns`` of a label request; :data:`TAIL_SAMPLES` stands for samples of any
    kind.
    """
    if config.tail == "sampled":
        return {TAIL_SAMPLES}
    if config.tail != "bucket":
        return set()  # what is renormalised over the stored tokens needs nothing else
    if isinstance(config.temperature, LinearTemperature):
        return {"power_sums", "entropy"}
    return _columns_at(1 / config.temperature)


def _columns_at(alpha: float) -> set[str]:
    if alpha == 1:
        return set()
    power = stored_power(alpha)
    if power is None:
        # the slope at 1, minus the entropy, is an end of the last interval only
        return {"power_sums", "entropy"} if alpha > _last_inner_power() else {"power_sums"}
    from storage.columns import LOG_POWER_SUM, SCALARS

    return {name for name, scalars in SCALARS.items() if LOG_POWER_SUM + power in scalars}


def _last_inner_power() -> float:
    from storage.columns import POWERS

    return max(power for power in POWERS.values() if power < 1)
