"""Which tokenizer a label set was made with, and the text of its tokens."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from storage.errors import ConfigError
from storage.fingerprint import DigestMemo, tokenizer_digest
from storage.records import LabelSetDocument
from storage.token_text import TokenText


class Tokenizers:
    """Directories with a tokenizer, by the digest of its files.

    A store holds token ids and the digest of the tokenizer, not the tokenizer.

    Args:
        given: Directories that the user names.
        others: Directories that may hold one, such as models in run folders; looked at only when
            none of the given ones fits.
        note: Where a text is told that the user should read.

    Raises:
        ConfigError: if a given directory has no ``tokenizer.json``.
    """

    def __init__(
        self, given: Sequence[Path], others: Sequence[Path], note: Callable[[str], None]
    ) -> None:
        for directory in given:
            if not (directory / "tokenizer.json").is_file():
                raise ConfigError(
                    f"{str(directory)!r} has no tokenizer.json; name the directory of the teacher, "
                    "or save its tokenizer as a fast one"
                )
        self.given, self._others, self.note = list(given), list(others), note
        self._memo = DigestMemo(None)
        self._loaded: dict[Path, TokenText] = {}

    def find(self, document: LabelSetDocument) -> TokenText | None:
        """The tokenizer of a label set, None if it is not here."""
        wanted = document.provenance.get("tokenizer")
        teacher = document.provenance.get("teacher")
        nearby = self._others if teacher is None else [Path(teacher), *self._others]
        candidates = [*self.given, *nearby]
        if wanted is None:  # no way to tell: only what the user names
            candidates = self.given
        for directory in candidates:
            if (directory / "tokenizer.json").is_file() and (
                wanted is None or tokenizer_digest(directory, self._memo) == wanted
            ):
                if directory not in self._loaded:
                    self._loaded[directory] = TokenText(directory)
                return self._loaded[directory]
        return None


class Texts:
    """The text of the tokens of one label set; null if its tokenizer is not here.

    Args:
        tokenizers: Where tokenizers are.
        document: Of the label set.
    """

    def __init__(self, tokenizers: Tokenizers, document: LabelSetDocument) -> None:
        self._tokenizers, self._document = tokenizers, document

    @cached_property
    def _tokens(self) -> TokenText | None:
        found = self._tokenizers.find(self._document)
        if found is None:
            digest = self._document.provenance.get("tokenizer", "unknown")
            given = ", ".join(map(str, self._tokenizers.given))
            self._tokenizers.note(
                f"text of label set {self._document.key} is NULL: its tokenizer (digest {digest}) "
                + (f"is not that of {given}; " if given else "was not found; ")
                + "name its directory with --tokenizer"
            )
        return found

    def of_tokens(self, ids: pa.Array) -> pa.Array:
        """string[N]: the text of N tokens, null where it is not known."""
        if self._tokens is None:
            return pa.nulls(len(ids), pa.string())
        texts = self._tokens.texts
        known = ids.to_numpy()
        return texts.take(pa.array(known, mask=(known < 0) | (known >= len(texts))))

    def of_lists(self, lists: pa.Array) -> pa.Array:
        """string[N]: the text of N lists of tokens, null where the list is."""
        if self._tokens is None:
            return pa.nulls(len(lists), pa.string())
        offsets = lists.offsets.to_numpy()
        items = lists.values.to_numpy(zero_copy_only=False)
        valid = np.asarray(lists.is_valid().to_numpy(zero_copy_only=False))
        return pa.array(
            [
                self._tokens.text(items[start:stop].tolist()) if there else None
                for start, stop, there in zip(offsets[:-1], offsets[1:], valid, strict=True)
            ],
            pa.string(),
        )
