"""Short forms of sections that come in several types. No torch import here."""

from collections.abc import Mapping

from pydantic import BeforeValidator


def short_form(default_type: str) -> BeforeValidator:
    """A name stands for the section of that type, a section without ``type`` has the default one.

    ``entropy`` means ``{type: entropy}``; where the default is ``static``, ``{soft_weight: 0.3}``
    means ``{type: static, soft_weight: 0.3}``.
    """

    def expand(value: object) -> object:
        if isinstance(value, str):
            return {"type": value}
        return {"type": default_type, **value} if isinstance(value, Mapping) else value

    return BeforeValidator(expand)
