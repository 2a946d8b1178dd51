"""Settings of low-rank adapters. No torch import here."""

from typing import Literal

from pydantic import Field

from storage.config import Config


class LoraConfig(Config):
    """Low-rank adapters: the student's own weights stay as they are, and small ones are learnt."""

    r: int = Field(default=16, ge=1)
    """Rank of every adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapters' product is scaled by ``alpha / r``."""
    rslora: bool = False
    """Scale by ``alpha / sqrt(r)`` instead, so that a higher rank does not learn more slowly."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of what goes into the adapters."""
    target_modules: Literal["all_linear"] | tuple[str, ...] = "all_linear"
    """Layers that get adapters: ``all_linear`` but the output embedding, or names such as
    ``q_proj``, each of which must be there."""
