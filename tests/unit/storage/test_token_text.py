"""The text of a token is its bytes, and can be turned back into them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from storage.errors import ConfigError
from storage.token_text import TokenText, escape_bytes, unescape_bytes

TEXTS = [
    "Grüße, 世界! 👩‍👩‍👧 \t tab\n",
    "def f(x):\n\treturn x\\n",
    "שלום עולם",
    " leading",
    "C:\\x41",
]


def byte_level(directory: Path, *, vocab_size: int = 280) -> Tokenizer:
    """So few merges that most characters outside ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


@given(st.binary(max_size=40))
def test_bytes_come_back_from_their_text(data: bytes) -> None:
    assert unescape_bytes(escape_bytes(data)) == data


@given(st.text(max_size=40))
def test_text_without_backslashes_is_shown_as_it_is(text: str) -> None:
    shown = text.replace("\\", "")
    data = shown.encode("utf-8", errors="surrogatepass")
    if data.decode("utf-8", errors="ignore") == shown:
        assert escape_bytes(data) == shown


def test_a_part_of_a_character_shows_as_its_bytes() -> None:
    assert escape_bytes("世".encode()[:2]) == "\\xe4\\xb8"
    assert escape_bytes(b"\\x41") == "\\\\x41"


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_a_byte_level_vocabulary_join_to_the_text(tmp_path: Path, text: str) -> None:
    tokenizer = byte_level(tmp_path)
    tokens = TokenText(tmp_path)
    ids = tokenizer.encode(text).ids
    assert b"".join(tokens.pieces[token] or b"" for token in ids) == text.encode()
    assert unescape_bytes(tokens.text(ids)) == text.encode()
    shown = [tokens.texts[token].as_py() for token in ids]
    assert b"".join(map(unescape_bytes, shown)) == text.encode()


def test_an_emoji_is_several_tokens_that_differ(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, vocab_size=257)
    ids = tokenizer.encode("👧").ids
    tokens = TokenText(tmp_path)
    assert [tokens.texts[token].as_py() for token in ids] == ["\\xf0", "\\x9f", "\\x91", "\\xa7"]


def test_special_tokens_are_shown_as_they_are_written(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    token = tokenizer.token_to_id("<|end|>")
    assert TokenText(tmp_path).texts[token].as_py() == "<|end|>"


def write(directory: Path, model: dict[str, object], decoder: object) -> TokenText:
    document = {"model": model, "decoder": decoder, "added_tokens": []}
    (directory / "tokenizer.json").write_text(json.dumps(document))
    return TokenText(directory)


def test_byte_fallback_and_word_marks_of_sentencepiece(tmp_path: Path) -> None:
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    steps = json.loads(decoder.__getstate__())
    vocabulary = {"▁Hi": 0, "<0xE4>": 1, "<0xB8>": 2, "<0x96>": 3, "a": 4}
    tokens = write(tmp_path, {"type": "BPE", "vocab": vocabulary}, steps)
    assert tokens.pieces == [b" Hi", b"\xe4", b"\xb8", b"\x96", b"a"]
    assert tokens.text([0, 1, 2, 3, 4]) == " Hi世a"
    assert tokens.text([1, 4]) == "\\xe4a"


def test_metaspace_wordpiece_and_end_of_word(tmp_path: Path) -> None:
    unigram = {"type": "Unigram", "vocab": [["▁the", -1.0], ["re", -2.0]]}
    found = write(tmp_path, unigram, {"type": "Metaspace", "replacement": "▁"})
    assert found.pieces == [b" the", b"re"]
    words = {"type": "WordPiece", "vocab": {"walk": 0, "##ing": 1}}
    assert write(tmp_path, words, {"type": "WordPiece", "prefix": "##"}).pieces == [
        b" walk",
        b"ing",
    ]
    ends = {"type": "BPE", "vocab": {"walk</w>": 0, "wa": 1}}
    found = write(tmp_path, ends, {"type": "BPEDecoder", "suffix": "</w>"})
    assert found.pieces == [b"walk ", b"wa"]


def test_words_without_a_decoder_are_joined_by_blanks(tmp_path: Path) -> None:
    tokens = write(tmp_path, {"type": "WordLevel", "vocab": {"one": 0, "two": 2}}, None)
    assert tokens.pieces == [b"one", None, b"two"]
    assert tokens.texts.to_pylist() == ["one", None, "two"]
    assert tokens.text([2, 0, 1, 7]) == "two one <|id 1|> <|id 7|>"


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        TokenText(tmp_path)
