"""Token ids as the bytes that they add to a text, and what kind of token they are.

Decoding one id alone cannot tell half a character from a broken one. So text is made of the bytes
of many tokens (``pieces.py``).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.errors import ConfigError
from storage.token_text import TokenText

Kind = Literal["text", "special", "unknown"]


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """What one token id adds to a text."""

    data: bytes
    """UTF-8, possibly a part of a character."""
    kind: Kind
    """``special`` tokens control the model, ``unknown`` ids have no text."""


class Vocabulary:
    """All token ids of a tokenizer as bytes.

    Args:
        tokens: Token id to what it adds; ids that are missing are ``unknown``.
    """

    def __init__(self, tokens: Mapping[int, TokenBytes]) -> None:
        self._tokens = tokens

    @classmethod
    def read(cls, directory: Path) -> "Vocabulary":
        """The vocabulary of a tokenizer directory.

        Raises:
            ConfigError: if its ``tokenizer.json`` is missing or is none.
        """
        file = directory / "tokenizer.json"
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            added = document.get("added_tokens", [])
            special = {entry["id"] for entry in added if entry.get("special")}
            literal = {entry["id"] for entry in added}
            # without a decoder tokens are whole words, which are joined with spaces
            before = b" " if document.get("decoder") is None else b""
            tokens = {
                number: TokenBytes(
                    data if number in literal else before + data,
                    "special" if number in special else "text",
                )
                for number, data in enumerate(TokenText(directory).pieces)
                if data is not None
            }
        except FileNotFoundError as error:
            raise ConfigError(
                f"{str(directory)!r} has no tokenizer.json; name the directory of the teacher's "
                "fast tokenizer, or show plain ids, with --tokenizer"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{str(file)!r} cannot be read as a tokenizer ({type(error).__name__}: {error}); "
                "save the teacher's tokenizer again with transformers"
            ) from error
        return cls(tokens)

    def __getitem__(self, token_id: int) -> TokenBytes:
        """What an id adds; every id has an answer."""
        found = self._tokens.get(token_id)
        return found or TokenBytes(f"<{token_id}>".encode(), "unknown")
