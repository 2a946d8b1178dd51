r"""The text of single tokens, exact to the byte.

A token of a byte-level vocabulary may be a part of a character. Decoders of text replace such parts
by U+FFFD, after which they cannot be told apart. Here every token is its bytes, written so that
they can be had back: bytes that are no UTF-8 as ``\xNN``, and a backslash as two.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.tokenizer import token_map

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ESCAPED = re.compile(rb"\\(?:\\|x([0-9a-f]{2}))")


def escape_bytes(data: bytes) -> str:
    r"""Bytes as text: what is UTF-8 as it is, other bytes as ``\xNN``, a backslash as two."""
    return data.replace(b"\\", b"\\\\").decode("utf-8", errors="backslashreplace")


def unescape_bytes(text: str) -> bytes:
    """The bytes that :func:`escape_bytes` wrote."""
    return _ESCAPED.sub(
        lambda found: b"\\" if found[1] is None else bytes([int(found[1], 16)]), text.encode()
    )


class TokenText:
    """Bytes and text of the tokens of a vocabulary.

    Args:
        directory: Directory of a tokenizer with a ``tokenizer.json``.

    Raises:
        ConfigError: if it has none.
    """

    def __init__(self, directory: Path) -> None:
        self._map = token_map(directory)
        document = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        self._added = {entry["content"] for entry in document.get("added_tokens", [])}
        self._steps = _decoder_steps(document.get("decoder"))
        self._joiner = b"" if self._steps else b" "  # as tokenizers do without a decoder

    @cached_property
    def pieces(self) -> list[bytes | None]:
        """The bytes of every id; None where no token has it."""
        found: list[bytes | None] = [None] * (max(self._map.values(), default=-1) + 1)
        for text, token in self._map.items():
            found[token] = text.encode() if text in self._added else self._bytes(text)
        return found

    @cached_property
    def texts(self) -> pa.Array:
        """string[V]: the text of every id, bytes escaped; null where no token has it."""
        return pa.array(
            [None if piece is None else escape_bytes(piece) for piece in self.pieces], pa.string()
        )

    def text(self, ids: Sequence[int]) -> str:
        """The text of several tokens, special ones included, bytes escaped.

        An id without a token shows as ``<|id N|>``.
        """
        pieces = self.pieces
        known = [
            piece
            if 0 <= token < len(pieces) and (piece := pieces[token]) is not None
            else f"<|id {token}|>".encode()
            for token in ids
        ]
        return escape_bytes(self._joiner.join(known))

    def _bytes(self, text: str) -> bytes:
        """The bytes of a token of the model, as its decoder makes them."""
        for step in self._steps:
            match step["type"]:
                case "ByteLevel":
                    if all(char in _BYTE_OF_CHAR for char in text):
                        return bytes(_BYTE_OF_CHAR[char] for char in text)
                case "ByteFallback":
                    if found := _BYTE_TOKEN.fullmatch(text):
                        return bytes([int(found[1], 16)])
                case "Metaspace":
                    text = text.replace(step.get("replacement", "\u2581"), " ")
                case "Replace":
                    if "String" in step["pattern"]:
                        text = text.replace(step["pattern"]["String"], step["content"])
                case "WordPiece":
                    prefix = step.get("prefix", "##")
                    text = text[len(prefix) :] if text.startswith(prefix) else f" {text}"
                case "BPEDecoder":
                    text = text.replace(step.get("suffix", "</w>"), " ")
        return text.encode()


def _decoder_steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a decoder, one after the other."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _decoder_steps(part)]
    return [decoder]


def _byte_characters() -> dict[str, int]:
    """The printable characters that stand for bytes in byte-level vocabularies, as GPT-2 did it."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    moved = {chr(256 + place): byte for place, byte in enumerate(others)}
    return {chr(byte): byte for byte in plain} | moved


_BYTE_OF_CHAR = _byte_characters()
