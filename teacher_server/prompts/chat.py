"""A conversation as text and token ids, through the teacher's chat template.

Templates leave out what they do not know without a word: tools, roles, the reasoning of a turn.
What would be lost is refused here.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Protocol

from teacher_server.prompts.bad_rows import BadRowError
from teacher_server.prompts.messages import REASONING_FIELDS, Conversation, tool_name

FRAGILE_ROLES = ("developer", "tool")
"""Roles that many templates skip."""
PROBE = "one two three"
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Span = tuple[int, int]
"""Characters [begin, end) of a text."""


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    eos_token_id: int | None
    all_special_tokens: list[str]
    added_tokens_decoder: Mapping[int, Any]
    special_tokens_map: Mapping[str, Any]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of plain text."""

    def get_chat_template(
        self, chat_template: str | None = None, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The Jinja template for conversations with these tools."""

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], **options: Any
    ) -> list[int] | str:
        """Token ids or text of a conversation."""


class ChatTemplate:
    """A tokenizer with its chat template, for any number of conversations."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of the special tokens, longest first."""
        added = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        names = {name for name in added.union(self.tokenizer.all_special_tokens) if name.strip()}
        return tuple(sorted(names, key=lambda name: (-len(name), name)))

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the template reads lists of text parts only, as those for images do."""
        return not self._writes(PROBE) and self._writes(_as_part(PROBE))

    @cached_property
    def answer_opening(self) -> str:
        """How the header of an answer begins: its special token, or all of it without one."""
        probe: object = _as_part(PROBE) if self.wants_parts else PROBE
        with suppress(Exception):
            texts = [
                str(
                    self.tokenizer.apply_chat_template(
                        [{"role": "user", "content": probe}],
                        add_generation_prompt=generation_prompt,
                        tokenize=False,
                    )
                )
                for generation_prompt in (False, True)
            ]
            header = texts[1].removeprefix(texts[0]).strip()
            return next((t for t in self.special_tokens if header.startswith(t)), header)
        return ""

    def _writes(self, content: object) -> bool:
        with suppress(Exception):
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False
            )
            return PROBE in str(text)
        return False


class Chat:
    """One conversation as the template writes it.

    Raises:
        BadRowError: from every method, if the template refuses the messages.
    """

    def __init__(self, conversation: Conversation, template: ChatTemplate) -> None:
        self.conversation = conversation
        self.template = template
        self._tools = None if conversation.tools is None else list(conversation.tools)
        with _refusals():
            self._source = template.tokenizer.get_chat_template(tools=self._tools)
        for name in conversation.template_options:
            if not re.search(rf"\b{re.escape(name)}\b", self._source):
                raise BadRowError(
                    f"chat_template_kwargs: the chat template knows no {name!r}; leave it out"
                )

    def prompt_ids(self) -> list[int]:
        """Token ids of the whole conversation with the header of the answer to come."""
        count = len(self.conversation.messages)
        if self._may_be_left_out(count):
            self.require_written(count, self.text(count, generation_prompt=True))
        return self.ids(count, generation_prompt=True)

    def ids(self, count: int, *, generation_prompt: bool) -> list[int]:
        """Token ids of the first messages."""
        messages = self.conversation.messages[:count]
        ids = self._apply(messages, generation_prompt, tokenize=True, return_dict=False)
        return [int(token) for token in ids]

    def text(self, count: int, *, generation_prompt: bool) -> str:
        """Text of the first messages."""
        messages = self.conversation.messages[:count]
        return str(self._apply(messages, generation_prompt, tokenize=False))

    def require_header_before(self, turn: int, prompt: str, written: str) -> None:
        """Refuse a template that writes the header of an answer after its generation prompt.

        Args:
            turn: Index of the message.
            prompt: Text up to this turn, with its generation prompt.
            written: What the template writes after it.

        Raises:
            BadRowError: if so; the header would be labelled as if the assistant wrote it.
        """
        opening = self.template.answer_opening
        if not opening or not written.lstrip().startswith(opening):
            return
        if opening not in prompt.removeprefix(self.text(turn, generation_prompt=False)):
            raise BadRowError(
                f"the chat template has no generation prompt before messages[{turn}] and writes "
                f"{opening!r} as part of it; give token ids (input_ids with completion_ids)"
            )

    def answered(self, answer: str) -> str:
        """Text of all messages and one more of the assistant."""
        messages = (*self.conversation.messages, {"role": "assistant", "content": answer})
        return str(self._apply(messages, generation_prompt=False, tokenize=False))

    @property
    def marks_generation(self) -> bool:
        """Whether the template says itself, with ``{% generation %}``, what an assistant writes."""
        return _GENERATION_TAG.search(self._source) is not None

    def generation_spans(self, count: int) -> list[Span]:
        """What the template marks with ``{% generation %}`` in the text of the first messages."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusals():
            _, spans = render_jinja_template(
                conversations=[self._as_wanted(self.conversation.messages[:count])],
                tools=self._tools,
                chat_template=self._source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                **{
                    **self.template.tokenizer.special_tokens_map,
                    **self.conversation.template_options,
                },
            )
        return [(int(begin), int(end)) for begin, end in spans[0]]

    def require_written(self, count: int, text: str) -> None:
        """Refuse a template that leaves out tools, tool calls, tool output or a developer.

        Args:
            count: Number of messages that were written.
            text: What the template made of them.

        Raises:
            BadRowError: naming what is left out.
        """
        wanted: Counter[str | None] = Counter()  # so often a name must occur at least
        for place, tool in enumerate(self._tools or ()):
            wanted[tool_name(tool)] += 1
            if str(tool_name(tool)) not in text:
                raise BadRowError(
                    f"the chat template leaves out tools[{place}] ({tool_name(tool)!r}); this "
                    "teacher's template has no place for tools: remove them, or give token ids"
                )
        for index, message in enumerate(self.conversation.messages[:count]):
            for call in message.get("tool_calls", ()):
                wanted[tool_name(call)] += 1
                if text.count(str(tool_name(call))) < wanted[tool_name(call)]:
                    raise _left_out(index, f"the call of {tool_name(call)!r}")
            if message["role"] in FRAGILE_ROLES and not _holds(text, message["content"]):
                raise _left_out(index, f"the content (role {message['role']!r})")

    def require_turn_written(self, turn: int, text: str) -> None:
        """Refuse a template that leaves out words of a turn that is labelled.

        Args:
            turn: Index of the message.
            text: Everything up to the end of this turn.

        Raises:
            BadRowError: naming the field that is left out.
        """
        written = "".join(text.split())  # templates set line breaks as they like
        message = self.conversation.messages[turn]
        for name in ("content", *REASONING_FIELDS):
            if "".join(message.get(name, "").split()) not in written:
                raise _left_out(turn, name)

    def _apply(
        self, messages: Sequence[dict[str, Any]], generation_prompt: bool, **how: bool
    ) -> list[int] | str:
        with _refusals():
            return self.template.tokenizer.apply_chat_template(
                self._as_wanted(messages),
                tools=self._tools,
                add_generation_prompt=generation_prompt,
                **how,
                **self.conversation.template_options,
            )

    def _as_wanted(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.template.wants_parts:
            return [{**message, "content": _as_part(message["content"])} for message in messages]
        return list(messages)

    def _may_be_left_out(self, count: int) -> bool:
        """Whether there is something that templates leave out, which costs one more rendering."""
        return bool(self._tools) or any(
            message["role"] in FRAGILE_ROLES or "tool_calls" in message
            for message in self.conversation.messages[:count]
        )


def _as_part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _holds(text: str, content: str) -> bool:
    """Whether a text holds this content, as it is or as a JSON string."""
    wanted = content.strip()
    return wanted in text or json.dumps(wanted, ensure_ascii=False)[1:-1] in text


def _left_out(index: int, what: str) -> BadRowError:
    return BadRowError(
        f"the chat template leaves out {what} of messages[{index}]; write it the way this "
        "template reads it, remove it, or give token ids (input_ids and completion_ids)"
    )


@contextmanager
def _refusals() -> Iterator[None]:
    """What a template raises, which may be anything, makes the row bad."""
    try:
        yield
    except Exception as error:
        raise BadRowError(f"the chat template refused the messages: {error}") from error
