"""A sequence of tokens as pieces of text: no character is ever broken.

A character may be split over several tokens. Those are joined: the first of them carries the whole
text, and each shows its own bytes.
"""

import codecs
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.inspection.vocabulary import Vocabulary

PieceKind = Literal["text", "part", "special", "unknown"]

BIDI_NAMES = {
    "\u202a": "LRE",
    "\u202b": "RLE",
    "\u202c": "PDF",
    "\u202d": "LRO",
    "\u202e": "RLO",
    "\u2066": "LRI",
    "\u2067": "RLI",
    "\u2068": "FSI",
    "\u2069": "PDI",
}
"""Characters that would reorder the text behind their own token."""

SPACES = {"\u00a0": "NBSP", "\u200b": "ZWSP", "\ufeff": "BOM", "\u2028": "LS", "\u2029": "PS"}
"""Invisible characters that are named wherever they stand."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of a sequence, ready to be shown."""

    token_id: int
    text: str
    """What it adds to the text; bytes of an incomplete character as ``<E2>``."""
    kind: PieceKind
    """``part``: its text holds bytes of an incomplete character."""
    joined: str | None = None
    """Text of all tokens of its group, on the first of several that share characters."""
    first: int = 0
    """Place of the first token of its group; its own if it is alone."""


def _hex_bytes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    broken = error.object[error.start : error.end]
    return "".join(f"<{byte:02X}>" for byte in broken), error.end


codecs.register_error("distill_hex", _hex_bytes)


def single(token_id: int, vocabulary: Vocabulary) -> Piece:
    """A token alone, as in a table of candidates."""
    return pieces([token_id], vocabulary)[0]


def pieces(ids: Sequence[int], vocabulary: Vocabulary) -> list[Piece]:
    """The tokens of a text, in order.

    The texts of all groups, one after another, are the text of the sequence.
    """
    tokens = [vocabulary[token_id] for token_id in ids]
    found: list[Piece] = []
    start = 0
    while start < len(tokens):
        if tokens[start].kind != "text":
            text = tokens[start].data.decode("utf-8", "distill_hex")
            found.append(Piece(ids[start], text, tokens[start].kind, first=start))
            start += 1
            continue
        stop = start
        while stop < len(tokens) and tokens[stop].kind == "text":
            stop += 1
        for first, last, whole in _groups([token.data for token in tokens[start:stop]]):
            for place in range(start + first, start + last):
                text = tokens[place].data.decode("utf-8", "distill_hex")
                alone = whole is not None and last - first == 1
                joined = whole if not alone and place == start + first else None
                kind: PieceKind = "text" if alone else "part"
                found.append(Piece(ids[place], text, kind, joined, start + first))
        start = stop
    return found


def _groups(parts: Sequence[bytes]) -> Iterator[tuple[int, int, str | None]]:
    """Shortest runs of parts that hold whole characters: start, stop and their text.

    Parts whose bytes are no UTF-8, whatever follows, come alone and have no text.
    """
    start = 0
    while start < len(parts):
        stop, data = start, b""
        text: str | None = None
        while stop < len(parts):
            data += parts[stop]
            stop += 1
            text, may_go_on = _decode(data)
            if not may_go_on:
                break
        if text is None:
            yield start, start + 1, None
            start += 1
        else:
            yield start, stop, text
            start = stop


def _decode(data: bytes) -> tuple[str | None, bool]:
    """The text of some bytes, or whether more bytes could make them text."""
    try:
        return data.decode(), False
    except UnicodeDecodeError as error:
        return None, error.reason == "unexpected end of data"


def visible(text: str) -> list[tuple[str, bool]]:
    """A text in runs, with signs for what would be invisible or act on a terminal.

    Returns:
        Runs of characters; True for signs, which are not part of the text. Line breaks and tabs
        follow their sign. Characters that reorder text or control a terminal occur only as signs.
    """
    if text and not text.strip(" "):
        return [("\u2423" * len(text), True)]
    runs: list[tuple[str, bool]] = []
    for character in text:
        sign, stays = _sign(character)
        for part, is_sign in ((sign, True), (character if stays else "", False)):
            if part and runs and runs[-1][1] == is_sign:
                runs[-1] = (runs[-1][0] + part, is_sign)
            elif part:
                runs.append((part, is_sign))
    return runs or [("\u2205", True)]


def _sign(character: str) -> tuple[str, bool]:
    """The sign of a character, empty for visible ones, and whether the character itself stays."""
    if character in "\n\t\r":
        return {"\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}[character], character != "\r"
    name = BIDI_NAMES.get(character) or SPACES.get(character)
    if name:
        return f"<{name}>", False
    if unicodedata.category(character) in ("Cc", "Cs"):
        code = ord(character)
        return (chr(0x2400 + code) if code < 0x20 else f"<{code:02X}>"), False
    return "", True


def plain(text: str) -> str:
    """A text on one line, with signs for what would be invisible."""
    return "".join(part for part, _ in visible(text)).replace("\n", "").replace("\t", "")


def spoken(text: str) -> str | None:
    """What a screen reader should say of a token whose text it would pass over, else None."""
    if text.strip() and any(character.isalnum() for character in text):
        return None
    names = []
    for character in text[:8]:
        fallback = f"byte {ord(character):02X}" if ord(character) < 0x100 else "character"
        names.append(_SPOKEN.get(character) or unicodedata.name(character, fallback).lower())
    return ", ".join(names) + (" and more" if len(text) > 8 else "") if names else "empty token"


_SPOKEN = {" ": "space", "\n": "line break", "\t": "tab", "\r": "carriage return"}
