"""Stop strings end a response at the token that completes one, as in vLLM."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from teacher_server.stop_strings import StopStrings


def completed(
    tokenizer: PreTrainedTokenizerFast, response: list[int], stop: list[str], prompt: str = "hi"
) -> tuple[int, str] | None:
    """How many tokens the response has when it ends, and the string that ended it."""
    finder = StopStrings(tokenizer, tokenizer.encode(prompt), stop)
    for number, token in enumerate(response, start=1):
        if (found := finder.completed_by(token)) is not None:
            return number, found
    return None


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abc def", ["c"], (3, "c")),
        ("abc def", ["c d"], (5, "c d")),
        ("abc def", ["x", "bc"], (3, "bc")),
        ("abc def", ["f", "a"], (1, "a")),
        ("abc", ["x"], None),
        # what began in the prompt does not count
        ("!", ["hi!"], None),
        ("aab", ["ab"], (3, "ab")),
        # both end with the same token: the one that is named first
        ("xyz", ["z", "yz"], (3, "z")),
        ("xyz", ["yz", "z"], (3, "yz")),
    ],
)
def test_the_token_that_completes_a_string_is_the_last(
    tokenizer: PreTrainedTokenizerFast, text: str, stop: list[str], expected: object
) -> None:
    """Every byte is a token, so tokens are characters here."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert completed(tokenizer, ids, stop) == expected


def test_of_two_strings_in_one_token_the_one_that_ends_first_counts() -> None:
    backend = Tokenizer(models.WordLevel({"<p>": 0, "stop now": 1}, unk_token="<p>"))
    backend.decoder = decoders.Fuse()
    words = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert StopStrings(words, [0], ["now", "op"]).completed_by(1) == "op"


def test_a_character_of_several_tokens_is_found_when_it_is_complete(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tokenizer.encode("a\u20acb", add_special_tokens=False)
    assert len(ids) == 5
    assert completed(tokenizer, ids, ["\u20ac"]) == (4, "\u20ac")
    assert completed(tokenizer, ids[:3], ["\ufffd"]) is None


def test_special_tokens_have_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    ids = tokenizer.encode("ab", add_special_tokens=False)
    assert completed(tokenizer, [ids[0], user, ids[1]], ["ab"]) == (3, "ab")
    assert completed(tokenizer, [user], ["user"]) is None


@given(
    st.lists(st.integers(0, 260), max_size=14),
    st.lists(st.integers(0, 260), max_size=6),
    st.lists(st.text("ab \u20ac\u00e9", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_any_bytes_end_where_the_decoder_of_vllm_ends_them(
    tokenizer: PreTrainedTokenizerFast, response: list[int], prompt: list[int], stop: list[str]
) -> None:
    """vLLM appends what the incremental decoder gives out, and searches after every token."""
    response = [*response, *tokenizer.encode("a b\u20ac", add_special_tokens=False)]
    prompt = [*prompt, *tokenizer.encode("hi", add_special_tokens=False)]
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    text, expected = "", None
    for number, token in enumerate(response, start=1):
        new = stream.step(tokenizer.backend_tokenizer, token) or ""
        text += new
        ends = {s: text.find(s) + len(s) for s in stop if s in text}
        if new and ends:
            expected = (number, min(ends, key=lambda s: ends[s]))
            break
    finder = StopStrings(tokenizer, prompt, stop)
    found = None
    for number, token in enumerate(response, start=1):
        if (string := finder.completed_by(token)) is not None:
            found = (number, string)
            break
    assert found == expected
