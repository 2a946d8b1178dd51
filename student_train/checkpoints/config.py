"""Settings of checkpoints. No torch import here."""

from pydantic import Field

from storage.config import Config


class CheckpointConfig(Config):
    """How often a training is saved, and where; never part of a student's key."""

    every_steps: int = Field(default=200, ge=1)
    """Steps between checkpoints; a crash repeats at most this many steps."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints that are kept, the newest ones. With two, a damaged one costs steps and not the
    training."""
    uri: str | None = None
    """Where copies go, for a run folder that may be lost: a directory, ``s3://``, ``gs://`` or
    ``az://``. A training gets a folder there, named like its output directory."""
