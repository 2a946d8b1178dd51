"""Stop strings, as vLLM defines them: a response ends with the token that completes one.

The text of a response is what its tokens add to the text of the prompt, special tokens left out.
Characters whose bytes are not complete yet are held back.
"""

from collections.abc import Sequence
from typing import Protocol

INCOMPLETE = "\ufffd"
"""What a decoder writes for bytes that are no character (yet)."""


class Decoder(Protocol):
    """The part of a Hugging Face tokenizer that is needed here."""

    def decode(
        self, ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        """The text of token ids."""


class StopStrings:
    """Reads a response token by token and tells when one of the stop strings is complete.

    Every token decodes the whole text again: slow and obvious.

    Args:
        tokenizer: Of the teacher.
        prompt_ids: Tokens before the response.
        stop: The stop strings; none of them is empty.
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids)
        self._stop = stop
        self._start = len(self._text().rstrip(INCOMPLETE))
        self._num_read = 0

    def completed_by(self, token: int) -> str | None:
        """The stop string that the next token completes; the one that ends first, if several do.

        Args:
            token: Not an end-of-sequence token: its text is no part of the response.
        """
        self._ids.append(token)
        text = self._text()[self._start :]
        if text.endswith(INCOMPLETE) or len(text) <= self._num_read:
            return None
        ends: dict[str, int] = {}
        for stop in self._stop:
            # a string that ended before was found before
            found = text.find(stop, max(0, self._num_read - len(stop) + 1))
            if found >= 0:
                ends[stop] = found + len(stop)
        self._num_read = len(text)
        return min(ends, key=lambda stop: ends[stop]) if ends else None

    def _text(self) -> str:
        return self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
