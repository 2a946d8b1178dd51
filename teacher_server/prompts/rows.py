"""Rows of prompt files, checked one by one, before any tokenizer is needed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.errors import InputError
from storage.selection import Source
from teacher_server.config import DataSource
from teacher_server.prompts.bad_rows import BadRow, BadRowError
from teacher_server.prompts.files import raw_rows
from teacher_server.prompts.messages import (
    Conversation,
    check_conversation,
    check_labelled_turns,
    require_last_role,
)

PROMPT_FIELDS = ("messages", "prompt", "input_ids")
CHAT_FIELDS = ("tools", "chat_template_kwargs", "label_turns")
"""Fields that mean something beside ``messages`` only."""
SHOWN_BAD_ROWS = 20


@dataclass(frozen=True, slots=True)
class GivenIds:
    """A response as token ids, such as the rollout of a student."""

    ids: tuple[int, ...]
    label_mask: tuple[bool, ...] | None
    """Which tokens are labelled, None for all."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One checked row of a prompt file; exactly one of the three prompt forms is set."""

    source: Source
    conversation: Conversation | None
    prompt: str | None
    input_ids: tuple[int, ...] | None
    completion: str | GivenIds | None
    """Score mode: the response, None where it stands in the conversation. Unused otherwise."""


@dataclass(slots=True)
class Prompts:
    """The rows of one split, good and bad."""

    rows: Iterable[PromptRow] = field(default_factory=list)
    """Good ones, in order."""
    bad: list[BadRow] = field(default_factory=list)
    """Grows while ``rows`` are taken, if they are read one by one."""

    def require_all_good(self) -> None:
        """Refuse to go on with bad rows.

        Raises:
            InputError: listing them.
        """
        if not self.bad:
            return
        shown = "\n  ".join(str(row) for row in self.bad[:SHOWN_BAD_ROWS])
        more = len(self.bad) - SHOWN_BAD_ROWS
        raise InputError(
            f"{len(self.bad)} unusable rows:\n  {shown}"
            + (f"\n  ... and {more} more" if more > 0 else "")
            + "\nfix them, or set data.on_bad_row to 'skip'"
        )


def read_prompts(sources: Sequence[DataSource], *, mode: str) -> Prompts:
    """Read and check all rows of a split, in order.

    Args:
        sources: Files and datasets.
        mode: ``generate`` or ``score``; a score row must bring its response.

    Raises:
        InputError: if a source does not exist or is of an unknown kind.
    """
    prompts = stream_prompts(sources, mode=mode)
    return Prompts(list(prompts.rows), prompts.bad)


def stream_prompts(sources: Sequence[DataSource], *, mode: str) -> Prompts:
    """As :func:`read_prompts`, but rows are read and checked while they are taken, once."""
    bad: list[BadRow] = []
    return Prompts(_checked_rows(sources, mode, bad), bad)


def _checked_rows(
    sources: Sequence[DataSource], mode: str, bad: list[BadRow]
) -> Iterator[PromptRow]:
    seen: dict[str, str] = {}  # of ids that rows bring: nobody else has an id FILE:LINE
    for source in sources:
        for line, row in raw_rows(Path(source.path)):
            place = f"{source.path}:{line}"
            try:
                if isinstance(row, BadRowError):
                    raise row
                checked = _check_row(row, file=source.path, line=line, mode=mode)
                name = checked.source.id
                first = seen.get(name) if name == place else seen.setdefault(name, place)
                if first not in (None, place):
                    raise BadRowError(f"id {name!r} is already used at {first}")
            except BadRowError as error:
                bad.append(BadRow(source.path, line, str(error)))
            else:
                yield checked


def _check_row(row: dict[str, Any], *, file: str, line: int, mode: str) -> PromptRow:
    present = [name for name in PROMPT_FIELDS if name in row]
    if len(present) != 1:
        raise BadRowError(
            f"a row needs exactly one of {', '.join(PROMPT_FIELDS)}; "
            f"found {present or sorted(row) or 'nothing'}"
        )
    number = row.get("id", f"{file}:{line}")
    if isinstance(number, bool) or not isinstance(number, str | int):
        raise BadRowError(f"id must be text or a whole number, got {number!r}")
    completion = _check_completion(row)
    conversation = None
    if "messages" in row:
        conversation = _check_chat(row, completion, mode)
    else:
        idle = [name for name in CHAT_FIELDS if row.get(name) is not None]
        if idle:
            raise BadRowError(f"{', '.join(idle)} go with messages, not with {present[0]}")
        if mode == "score" and completion is None:
            raise BadRowError(
                "score mode needs a completion or completion_ids "
                "(or messages that end with an assistant)"
            )
    prompt = row.get("prompt")
    if "prompt" in row and (not isinstance(prompt, str) or not prompt.strip()):
        raise BadRowError(f"prompt must be non-empty text, got {prompt!r:.60}")
    return PromptRow(
        source=Source(file, line, str(number)),
        conversation=conversation,
        prompt=prompt,
        input_ids=_check_ids(row, "input_ids") if "input_ids" in row else None,
        completion=completion,
    )


def _check_chat(row: dict[str, Any], completion: str | GivenIds | None, mode: str) -> Conversation:
    conversation = check_conversation(row)
    if mode == "generate":
        require_last_role(conversation, ("user", "tool"), mode)
        return conversation
    if completion is None:
        require_last_role(conversation, ("assistant",), mode)
        return check_labelled_turns(row, conversation)
    if conversation.messages[-1]["role"] == "assistant":
        raise BadRowError("give the response as completion or as the last message, not both")
    require_last_role(conversation, ("user", "tool"), mode)
    return conversation


def _check_completion(row: dict[str, Any]) -> str | GivenIds | None:
    text, ids, mask = (row.get(n) for n in ("completion", "completion_ids", "label_mask"))
    if text is not None and ids is not None:
        raise BadRowError("give the response as completion or as completion_ids, not both")
    if text is not None and (not isinstance(text, str) or not text):
        raise BadRowError(f"completion must be non-empty text, got {text!r:.60}")
    if ids is None:
        if mask is not None:
            raise BadRowError("label_mask goes with completion_ids: it has one entry per token")
        return text
    checked = _check_ids(row, "completion_ids")
    return GivenIds(checked, None if mask is None else _check_mask(mask, len(checked)))


def _check_mask(mask: object, length: int) -> tuple[bool, ...] | None:
    if not isinstance(mask, list) or any(
        not isinstance(value, bool | int) or value not in (0, 1) for value in mask
    ):
        raise BadRowError(f"label_mask must be a list of 0 and 1, got {mask!r:.60}")
    if len(mask) != length:
        raise BadRowError(
            f"label_mask has {len(mask)} entries for the {length} tokens of completion_ids"
        )
    if not any(mask):
        raise BadRowError("label_mask leaves no token to label; leave the row out")
    return None if all(mask) else tuple(bool(value) for value in mask)


def _check_ids(row: dict[str, Any], name: str) -> tuple[int, ...]:
    value = row[name]
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{name} must be a non-empty list, got {value!r:.60}")
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in value):
        raise BadRowError(f"{name} must be whole numbers >= 0")
    return tuple(value)
