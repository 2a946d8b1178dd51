"""One conversation of a row, checked: messages, tools, and which turns are labelled."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from teacher_server.prompts.bad_rows import BadRowError

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of an assistant message that templates of thinking models read."""
TURN_SWITCHES = ("train", "weight")
"""Fields that say whether an assistant turn is labelled. They never reach the template."""
RESERVED_OPTIONS = frozenset(
    {
        "messages",
        "conversation",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
"""What a row may not set in ``chat_template_kwargs``: it is decided here."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the chat template is given."""

    messages: tuple[dict[str, Any], ...]
    """Content is text; arguments of tool calls are objects; nothing is null."""
    tools: tuple[dict[str, Any], ...] | None
    """JSON schemas of the tools, None without any."""
    template_options: dict[str, Any]
    """Variables for the template, such as ``enable_thinking``."""
    labelled: tuple[int, ...] = ()
    """Score mode: the assistant messages to label, by index, increasing."""


def check_conversation(row: dict[str, Any]) -> Conversation:
    """The conversation of a row; which turns are labelled is not looked at.

    Raises:
        BadRowError: naming the message or tool that cannot be used.
    """
    value = row["messages"]
    if not isinstance(value, list) or not value:
        raise BadRowError(f"messages must be a non-empty list, got {value!r:.60}")
    messages = tuple(_check_message(message, index) for index, message in enumerate(value))
    roles = [message["role"] for message in messages]
    for index, role in enumerate(roles):
        if role == "system" and index > 0:
            raise BadRowError(f"messages[{index}]: only the first message may be of the system")
        if role == "developer" and roles[:index] not in ([], ["system"]):
            raise BadRowError(
                f"messages[{index}]: only the first message may be of the developer, "
                "or the second after one of the system"
            )
    if "user" not in roles:
        raise BadRowError("messages hold no user message")
    return Conversation(
        messages, _check_tools(row.get("tools")), _check_options(row.get("chat_template_kwargs"))
    )


def check_labelled_turns(row: dict[str, Any], conversation: Conversation) -> Conversation:
    """The conversation with the turns that the row wants to be labelled.

    These are all turns of the assistant but those that say ``"train": false`` or ``"weight": 0``;
    with ``"label_turns": "last"`` only the last one.

    Raises:
        BadRowError: if a switch has no meaning, or nothing is left.
    """
    wanted = row.get("label_turns", "all")
    if wanted not in ("all", "last"):
        raise BadRowError(f"label_turns must be 'all' or 'last', got {wanted!r:.60}")
    turns = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
    labelled = [turn for turn in turns if _is_labelled(row["messages"][turn], turn)]
    if wanted == "last":
        if len(labelled) < len(turns):
            raise BadRowError("label_turns 'last' and switches of single messages: use one of them")
        labelled = turns[-1:]
    if not labelled:
        raise BadRowError("no assistant turn is left to label; leave the row out")
    return replace(conversation, labelled=tuple(labelled))


def _is_labelled(message: dict[str, Any], index: int) -> bool:
    given = {name: message[name] for name in TURN_SWITCHES if message.get(name) is not None}
    for name, value in given.items():
        # True == 1 and False == 0: both fields take both spellings
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise BadRowError(
                f"messages[{index}].{name} must be true or false (1 or 0), got {value!r:.60}; "
                "labels have no other weights"
            )
    if len({bool(value) for value in given.values()}) > 1:
        raise BadRowError(f"messages[{index}]: train and weight contradict each other")
    return all(given.values())


def _check_message(message: object, index: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRowError(f"messages[{index}] must be an object, got {message!r:.60}")
    role = message.get("role")
    if role not in ROLES:
        raise BadRowError(f"messages[{index}].role must be one of {', '.join(ROLES)}; got {role!r}")
    checked = {
        name: value
        for name, value in message.items()
        if value is not None and name not in TURN_SWITCHES
    }
    if role == "assistant":
        _check_assistant(checked, index)
    content = _check_content(checked.get("content"), index)
    if content is None and role == "assistant" and _may_be_empty(checked):
        content = ""  # null and missing are written differently by templates, and empty by none
    allowed_empty = role == "tool" or (role == "assistant" and _may_be_empty(checked))
    if content is None or not (content.strip() or allowed_empty):
        raise BadRowError(
            f"messages[{index}].content must be {'' if role == 'tool' else 'non-empty '}text, "
            f"got {message.get('content')!r:.60}"
        )
    return {**checked, "content": content}


def _may_be_empty(message: dict[str, Any]) -> bool:
    return "tool_calls" in message or any(message.get(name) for name in REASONING_FIELDS)


def _check_content(content: object, index: int) -> str | None:
    """Content as text. Text parts are joined by line breaks, as vLLM does."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRowError(
            f"messages[{index}].content must be text or a list of text parts, got {content!r:.60}"
        )
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in (None, "text"):
            raise BadRowError(
                f"messages[{index}].content[{place}] is of type {kind!r}; only parts of type "
                "'text' can be labelled, no images, audio or files"
            )
        if not isinstance(part, dict) or kind is None or not isinstance(part.get("text"), str):
            raise BadRowError(
                f"messages[{index}].content must be text or a list of "
                f'{{"type": "text", "text": ...}}; part {place} is {part!r:.60}'
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _check_assistant(message: dict[str, Any], index: int) -> None:
    """Check what only an assistant has; tool calls come out as templates expect them."""
    for name in REASONING_FIELDS:
        if not isinstance(message.get(name, ""), str):
            raise BadRowError(f"messages[{index}].{name} must be text, got {message[name]!r:.60}")
    calls = message.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise BadRowError(f"messages[{index}].tool_calls must be a list, got {calls!r:.60}")
    if calls:
        message["tool_calls"] = [
            _check_call(call, f"messages[{index}].tool_calls[{place}]")
            for place, call in enumerate(calls)
        ]


def _check_call(call: object, place: str) -> dict[str, Any]:
    """A call with its arguments as an object, which is what templates write as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise BadRowError(
            f'{place} must be {{"type": "function", "function": {{"name": ..., "arguments": '
            f"...}}}}, got {call!r:.60}"
        )
    assert isinstance(call, dict)
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        with suppress(ValueError, RecursionError):  # what stays text is refused below
            arguments = json.loads(arguments)
    elif arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadRowError(
            f"{place}: arguments must be an object, or JSON text of one, got {arguments!r:.60}; "
            "to label text that is no valid call, give token ids"
        )
    called = {**function, "arguments": arguments}
    return {**call, "function": called} if "function" in call else called


def _check_tools(value: object) -> tuple[dict[str, Any], ...] | None:
    """Schemas of tools; JSON text is read too, because Arrow cannot hold schemas of two shapes."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"tools is text and not valid JSON: {error}") from error
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise BadRowError(f"tools must be a list of JSON schemas, got {value!r:.60}")
    for place, tool in enumerate(value):
        if not isinstance(tool, dict) or tool_name(tool) is None:
            raise BadRowError(
                f'tools[{place}] must be {{"type": "function", "function": {{"name": ..., '
                f'"parameters": ...}}}}, got {tool!r:.60}'
            )
    return tuple(value)


def tool_name(tool: dict[str, Any]) -> str | None:
    """Name of a tool or of a tool call, None if it has none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if _is_name(name) else None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_options(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRowError(f"chat_template_kwargs must be an object, got {value!r:.60}")
    reserved = sorted(RESERVED_OPTIONS & set(value))
    if reserved:
        raise BadRowError(f"chat_template_kwargs may not set {', '.join(reserved)}")
    return value


def require_last_role(conversation: Conversation, wanted: Sequence[str], mode: str) -> None:
    """Refuse a conversation that ends with another role.

    Raises:
        BadRowError: naming the role found.
    """
    found = conversation.messages[-1]["role"]
    if found not in wanted:
        raise BadRowError(
            f"the last message must be of {' or '.join(wanted)} in {mode} mode, got {found!r}"
        )
