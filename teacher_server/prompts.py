"""From prompt files to a selection: read, check, tokenize, key.

Nothing is dropped silently. Every unusable row becomes a :class:`BadRow` that names file and line;
by default they stop the job before any teacher call.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import InputError
from storage.keys import sample_key
from storage.selection import SampleRequest, Selection, Source
from teacher_server.config import DataSource, LabelConfig

ROLES = ("system", "user", "assistant", "tool")
PROMPT_FIELDS = ("messages", "prompt", "input_ids")
SHOWN_BAD_ROWS = 20
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of plain text."""

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], **options: Any
    ) -> list[int] | str:
        """Token ids of a conversation."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    file: str
    line: int
    problem: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.problem}"


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One checked row of a prompt file; exactly one of the three prompt forms is set."""

    source: Source
    messages: tuple[dict[str, Any], ...] | None
    prompt: str | None
    input_ids: tuple[int, ...] | None
    completion: str | None


@dataclass(slots=True)
class Prompts:
    """The rows of one split, good and bad."""

    rows: list[PromptRow] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)

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


class BadRowError(ValueError):
    """Internal: why one row is unusable."""


def read_prompts(sources: Sequence[DataSource], *, mode: str) -> Prompts:
    """Read and check all rows of a split, in order.

    Args:
        sources: Files and datasets.
        mode: ``generate`` or ``score``; a score row must bring its response.

    Raises:
        InputError: if a source does not exist or is of an unknown kind.
    """
    prompts = Prompts()
    seen: dict[str, str] = {}
    for source in sources:
        for line, row in _raw_rows(Path(source.path)):
            try:
                if isinstance(row, BadRowError):
                    raise row
                checked = _check_row(row, file=source.path, line=line, mode=mode)
                place = f"{source.path}:{line}"
                if seen.setdefault(checked.source.id, place) != place:
                    raise BadRowError(
                        f"id {checked.source.id!r} is already used at {seen[checked.source.id]}"
                    )
                prompts.rows.append(checked)
            except BadRowError as error:
                prompts.bad.append(BadRow(source.path, line, str(error)))
    return prompts


def _raw_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRowError]]:
    """(line, row) of a file; lines count from 1."""
    if path.is_dir():
        yield from enumerate(_saved_dataset(path), start=1)
    elif not path.is_file():
        raise InputError(f"prompt file {str(path)!r} does not exist (read from {Path.cwd()})")
    elif path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
    elif path.suffix in (".jsonl", ".ndjson"):
        with path.open("rb") as stream:
            for line, data in enumerate(stream, start=1):
                if data.strip():
                    yield line, _json_row(data)
    else:
        raise InputError(
            f"prompt file {str(path)!r} is of an unknown kind; "
            "use .jsonl, .parquet or the directory of a dataset saved to disk"
        )


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield {name: value for name, value in row.items() if value is not None}
    except pa.ArrowException as error:
        raise InputError(f"prompt file {str(path)!r} cannot be read: {error}") from error


def _json_row(data: bytes) -> dict[str, Any] | BadRowError:
    try:
        # without the line break: what is missing is missing at the end of this line
        row = json.loads(data.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return BadRowError(f"not valid UTF-8: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRowError(f"not valid JSON: {error.msg} at column {error.colno}")
    if not isinstance(row, dict):
        return BadRowError(f"a row must be a JSON object, got {type(row).__name__}")
    if b"\\ud" in data.lower() and _SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        return BadRowError("half of a surrogate pair (\\ud800 to \\udfff) is no character")
    return row


def _saved_dataset(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"reading the saved dataset {str(path)!r} needs the package `datasets`; install it"
        ) from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a dataset saved to disk: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        raise InputError(
            f"{str(path)!r} holds several splits {sorted(loaded)}; name one, "
            f"such as {path / sorted(loaded)[0]}"
        )
    for row in loaded:
        yield {name: value for name, value in row.items() if value is not None}


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
    completion = row.get("completion")
    if completion is not None and (not isinstance(completion, str) or not completion):
        raise BadRowError(f"completion must be non-empty text, got {completion!r:.60}")
    messages = _check_messages(row["messages"], mode) if "messages" in row else None
    if mode == "score" and messages is not None and completion is not None:
        raise BadRowError("give the response as completion or as the last message, not both")
    prompt = row.get("prompt")
    if "prompt" in row and (not isinstance(prompt, str) or not prompt.strip()):
        raise BadRowError(f"prompt must be non-empty text, got {prompt!r:.60}")
    if mode == "score" and messages is None and completion is None:
        raise BadRowError("score mode needs a completion (or messages that end with an assistant)")
    return PromptRow(
        source=Source(file, line, str(number)),
        messages=messages,
        prompt=prompt,
        input_ids=_check_input_ids(row["input_ids"]) if "input_ids" in row else None,
        completion=completion,
    )


def _check_messages(value: object, mode: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise BadRowError(f"messages must be a non-empty list, got {value!r:.60}")
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise BadRowError(f"messages[{index}] must be an object, got {message!r:.60}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadRowError(
                f"messages[{index}].role must be one of {', '.join(ROLES)}; got {role!r}"
            )
        if role == "system" and index > 0:
            raise BadRowError(f"messages[{index}]: only the first message may be of the system")
        if not isinstance(content, str) or not content.strip():
            raise BadRowError(
                f"messages[{index}].content must be non-empty text, got {content!r:.60}"
            )
    roles = [message["role"] for message in value]
    last = ("assistant",) if mode == "score" else ("user", "tool")
    if roles[-1] not in last:
        raise BadRowError(
            f"the last message must be of {' or '.join(last)} in {mode} mode, got {roles[-1]!r}"
        )
    if "user" not in roles:
        raise BadRowError("messages hold no user message")
    return tuple({k: v for k, v in message.items() if v is not None} for message in value)


def _check_input_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise BadRowError(f"input_ids must be a non-empty list, got {value!r:.60}")
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in value):
        raise BadRowError("input_ids must be whole numbers >= 0")
    return tuple(value)


def select_samples(
    prompts: Prompts, tokenizer: Tokenizer, label: LabelConfig, *, context: int, vocab_size: int
) -> Selection:
    """Tokenize good rows and give every sample its key; rows that fail here turn bad.

    Equal prompts are one sample with several sources.

    Args:
        prompts: Checked rows; ``prompts.bad`` grows by rows that do not fit.
        tokenizer: The teacher's, with its chat template.
        label: Mode and number of samples per prompt.
        context: Tokens that the teacher can attend to.
        vocab_size: Effective vocabulary.
    """
    merged: dict[str, SampleRequest] = {}
    for row in prompts.rows:
        try:
            prompt_ids, response_ids = _tokenize(row, tokenizer, label.mode)
            _check_lengths(prompt_ids, response_ids, context, vocab_size)
        except BadRowError as error:
            prompts.bad.append(BadRow(row.source.file, row.source.line, str(error)))
            continue
        count = 1 if response_ids is not None else label.sampling.samples_per_prompt
        for index in range(count):
            key = sample_key(prompt_ids, index, response_ids=response_ids)
            known = merged.get(key)
            merged[key] = SampleRequest(
                key=key,
                sample_index=index,
                prompt_ids_P=np.array(prompt_ids, dtype=np.int32),
                response_ids_R=None
                if response_ids is None
                else np.array(response_ids, dtype=np.int32),
                sources=(*(known.sources if known else ()), row.source),
            )
    return Selection(tuple(merged.values()))


def _tokenize(
    row: PromptRow, tokenizer: Tokenizer, mode: str
) -> tuple[list[int], list[int] | None]:
    """Prompt ids, and in score mode the ids of the given response with its end marker."""
    if row.messages is not None:
        return _tokenize_chat(row.messages, tokenizer, mode)
    prompt_ids = (
        list(row.input_ids)
        if row.input_ids is not None
        else tokenizer.encode(row.prompt or "", add_special_tokens=True)
    )
    if mode == "generate":
        return prompt_ids, None
    response_ids = tokenizer.encode(row.completion or "", add_special_tokens=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return prompt_ids, response_ids + end


def _tokenize_chat(
    messages: tuple[dict[str, Any], ...], tokenizer: Tokenizer, mode: str
) -> tuple[list[int], list[int] | None]:
    def apply(conversation: Sequence[dict[str, Any]], *, generation_prompt: bool) -> list[int]:
        try:
            ids = tokenizer.apply_chat_template(
                list(conversation),
                add_generation_prompt=generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        except Exception as error:
            raise BadRowError(f"the chat template refused the messages: {error}") from error
        return [int(token) for token in ids]

    if mode == "generate":
        return apply(messages, generation_prompt=True), None
    prompt_ids = apply(messages[:-1], generation_prompt=True)
    whole = apply(messages, generation_prompt=False)
    if whole[: len(prompt_ids)] != prompt_ids:
        raise BadRowError("the chat template rewrites earlier turns; give token ids instead")
    return prompt_ids, whole[len(prompt_ids) :]


def _check_lengths(
    prompt_ids: Sequence[int], response_ids: Sequence[int] | None, context: int, vocab_size: int
) -> None:
    if not prompt_ids:
        raise BadRowError("the prompt is empty after tokenization")
    if response_ids is not None and not response_ids:
        raise BadRowError("the completion is empty after tokenization")
    ids = [*prompt_ids, *(response_ids or ())]
    if len(ids) + 1 > context:  # engines want room for one more token, also where they only score
        what = "prompt" if response_ids is None else "prompt and completion"
        raise BadRowError(
            f"{what} of {len(ids)} tokens do not fit the teacher's context of {context}, "
            "which needs room for one more"
        )
    if max(ids) >= vocab_size:
        raise BadRowError(f"token id {max(ids)} leaves the vocabulary of {vocab_size}")
