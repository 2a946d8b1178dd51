"""The base of every configuration section of every package."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen section: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
