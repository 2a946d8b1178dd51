"""Tokens as text: no broken character, nothing lost, nothing that acts on the screen."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from pipeline.inspection.pieces import Piece, pieces, plain, single, spoken, visible
from pipeline.inspection.testing import SPECIAL, WORDS, write_tokenizer
from pipeline.inspection.vocabulary import TokenBytes, Vocabulary
from storage.errors import ConfigError


def shown(found: list[Piece]) -> str:
    """What a reader sees: each group once."""
    return "".join(
        piece.text if piece.joined is None else piece.joined
        for place, piece in enumerate(found)
        if piece.first == place
    )


def of_parts(*parts: bytes) -> list[Piece]:
    vocabulary = Vocabulary({n: TokenBytes(part, "text") for n, part in enumerate(parts)})
    return pieces(range(len(parts)), vocabulary)


@given(data=st.data(), text=st.text(min_size=1))
def test_any_cutting_of_a_text_shows_the_text(data: st.DataObject, text: str) -> None:
    raw = text.encode("utf-8", "ignore")
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))) | {0, len(raw)})
    parts = [raw[low:high] for low, high in pairwise(cuts)]
    found = of_parts(*parts)
    assert shown(found) == raw.decode()
    assert all("\ufffd" not in piece.text or "\ufffd" in text for piece in found)


@given(parts=st.lists(st.binary(max_size=5).map(lambda data: data.replace(b"<", b""))))
def test_any_bytes_are_shown_and_none_is_lost(parts: list[bytes]) -> None:
    found = of_parts(*parts)
    again = re.sub(
        rb"<([0-9A-F]{2})>", lambda byte: bytes([int(byte[1], 16)]), shown(found).encode()
    )
    assert again == b"".join(parts)
    assert all(0 <= piece.first <= place for place, piece in enumerate(found))


def test_a_character_of_three_tokens_is_shown_once_and_each_token_shows_its_bytes() -> None:
    found = of_parts(b"a", b"\xf0\x9f", b"\x98", b"\x80", b"b")
    assert [piece.text for piece in found] == ["a", "<F0><9F>", "<98>", "<80>", "b"]
    assert [piece.kind for piece in found] == ["text", "part", "part", "part", "text"]
    assert [piece.joined for piece in found] == [None, "\U0001f600", None, None, None]
    assert [piece.first for piece in found] == [0, 1, 1, 1, 4]


def test_a_token_that_ends_one_character_and_begins_the_next_joins_all_three() -> None:
    found = of_parts(b"\xe6\xbc", b"\xa2\xe5", b"\xad\x97", b".")
    assert shown(found) == "\u6f22\u5b57."
    assert [piece.first for piece in found] == [0, 0, 0, 3]


def test_bytes_that_never_become_a_character_are_shown_as_bytes() -> None:
    assert [piece.text for piece in of_parts(b"a\xe2", b"b", b"\x80")] == ["a<E2>", "b", "<80>"]
    cut = of_parts(b"ok", b"\xf0\x9f")  # as in a response cut by length
    assert (cut[1].text, cut[1].kind, cut[1].joined) == ("<F0><9F>", "part", None)


def test_a_special_token_does_not_join_with_half_characters() -> None:
    vocabulary = Vocabulary(
        {
            0: TokenBytes(b"\xe2", "text"),
            1: TokenBytes(b"<|end|>", "special"),
            2: TokenBytes(b"\x82\xac", "text"),
        }
    )
    found = pieces([0, 1, 2, 9], vocabulary)
    assert [piece.text for piece in found] == ["<E2>", "<|end|>", "<82><AC>", "<9>"]
    assert [piece.kind for piece in found] == ["part", "special", "part", "unknown"]


def test_a_byte_level_tokenizer_gives_back_every_text(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    vocabulary = Vocabulary.read(tmp_path)
    family, word = "\U0001f468\u200d\U0001f469", "\u05e9\u05dc\u05d5\u05dd"
    text = f"<|user|>hello world {family} \u6f22 {word}\n\t</script>"
    ids = tokenizer.encode(text).ids
    found = pieces(ids, vocabulary)
    assert shown(found) == text == tokenizer.decode(ids, skip_special_tokens=False)
    assert found[0].kind == "special"
    assert {single(tokenizer.token_to_id(word), vocabulary).text for word in WORDS} == set(WORDS)
    assert single(tokenizer.token_to_id(SPECIAL[0]), vocabulary).kind == "special"


def test_a_sentencepiece_tokenizer_with_byte_fallback(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "\u2581Hi": 1, "\u2581you": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = pieces([1, 2, 3, 4, 5], Vocabulary.read(tmp_path))
    assert shown(found) == " Hi you\u20ac"
    assert found[2].joined == "\u20ac"


def test_whole_words_are_joined_with_spaces(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert shown(pieces([0, 1], Vocabulary.read(tmp_path))).strip() == tokenizer.decode([0, 1])


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {"vocab": {"a": "b"}}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json.*cannot be read as a tokenizer"):
        Vocabulary.read(tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no tokenizer"):
        Vocabulary.read(tmp_path)


# -- signs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("", "\u2205"),
        ("  ", "\u2423\u2423"),
        ("a\n", "a\u21b5"),
        ("\t", "\u21e5"),
        ("\r", "\u240d"),
        ("\x1b[2J", "\u241b[2J"),
        ("\x9b", "<9B>"),
        ("\u202eabc", "<RLO>abc"),
        ("\u200b", "<ZWSP>"),
        ("\u05e9", "\u05e9"),
    ],
)
def test_what_is_invisible_has_a_sign(text: str, sign: str) -> None:
    assert plain(text) == sign


@given(st.text())
def test_nothing_that_acts_on_a_terminal_or_reorders_text_is_left(text: str) -> None:
    out = "".join(run for run, _ in visible(text))
    assert not any(ord(c) < 32 and c not in "\n\t" for c in out)
    assert not any(c in "\x7f\u202a\u202b\u202d\u202e\u2066\u2067\u2068" for c in out)
    assert not any(0x80 <= ord(c) < 0xA0 for c in out)
    kept = "".join(run for run, is_sign in visible(text) if not is_sign)
    assert set(kept) <= set(text)


def test_a_screen_reader_hears_what_would_be_silent() -> None:
    assert spoken("word") is None
    assert spoken(" ") == "space"
    assert spoken("\n\t") == "line break, tab"
    assert spoken("\U0001f600") == "grinning face"
    assert spoken("") == "empty token"
    assert spoken("." * 9) == ", ".join(["full stop"] * 8) + " and more"
