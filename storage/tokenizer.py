"""What both sides must know of a tokenizer, as plain data: which text has which id."""

import json
from collections.abc import Sequence
from pathlib import Path

from storage.errors import ConfigError


def token_map(directory: Path) -> dict[str, int]:
    """Token text to id, added tokens included, from ``tokenizer.json``.

    Raises:
        ConfigError: if the directory has none.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            f"{str(directory)!r} has no tokenizer.json; load the tokenizer with transformers and "
            "save it as a fast tokenizer"
        )
    document = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):  # unigram models list [token, score]
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    added = {entry["content"]: entry["id"] for entry in document.get("added_tokens", [])}
    return {**vocabulary, **added}


def effective_vocab_size(directory: Path) -> int:
    """One more than the largest token id; rows of an embedding beyond it are padding.

    Raises:
        ConfigError: as :func:`token_map`.
    """
    return max(token_map(directory).values()) + 1


class TokenDecoder:
    """Token ids as text, for people to read.

    Args:
        directory: Directory of a tokenizer with a ``tokenizer.json``.
    """

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def text(self, ids: Sequence[int]) -> str:
        """The text of several tokens, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def token(self, token_id: int) -> str:
        """The text of one token alone; half a character shows as U+FFFD."""
        return self.text([token_id])
