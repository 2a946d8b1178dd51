"""Chat templates, compared by what they write: equal templates can be written in many ways."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from student_train.preflight.findings import Finding
from student_train.preflight.subject import Ids, Subject

PROBE = "Was it quartz?"
WAY_OUT = "set train.chat_template: teacher"
SHOWN_CHARACTERS = 40

SYSTEM = {"role": "system", "content": "You are terse."}
USER = {"role": "user", "content": PROBE}
ANSWER = {"role": "assistant", "content": "Yes."}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks it up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "a question": ([USER], {"add_generation_prompt": True}),
    "a system turn": ([SYSTEM, USER], {"add_generation_prompt": True}),
    "several turns": ([USER, ANSWER, USER], {"add_generation_prompt": True}),
    "an answer": ([USER, ANSWER], {"add_generation_prompt": False}),
}
"""Conversations that a prompt or a response may be."""

RARE_CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "a tool": ([USER], {"add_generation_prompt": True, "tools": [TOOL]}),
}
"""A difference here is a warning: it matters only where prompts have such turns."""


def check_template(subject: Subject) -> Finding:
    """The student writes conversations as the labels' prompts were written.

    It matters only where prompts were written with the teacher's template, which is read off the
    cached tokens: data may also hold plain text and token ids.
    """
    if subject.gets_teachers_tokenizer:
        return _finding("ok", "the exported student gets the teacher's chat template")
    theirs, ours = subject.teacher_tokenizer, subject.student_tokenizer
    if not theirs.chat_template:
        return _finding("ok", "the teacher has none")
    used = uses_template(theirs, subject.prompts)
    if used is False:
        return _finding("ok", "the labels' prompts were not written with one")
    if not ours.chat_template:
        return _finding(
            "refused" if used else "warning",
            "the student has no chat template, and the labels' prompts were written with the "
            f"teacher's; {WAY_OUT}",
        )
    difference = first_difference(theirs, ours, CONVERSATIONS)
    if difference is not None:
        return _finding(
            "refused" if used else "warning",
            f"the student's chat template differs from the labels' in {difference}; {WAY_OUT}",
        )
    difference = first_difference(theirs, ours, RARE_CONVERSATIONS)
    if difference is not None:
        return _finding(
            "warning",
            f"the student's chat template differs from the labels' in {difference}; if the prompts "
            f"have such turns, {WAY_OUT}",
        )
    return _finding("ok", "both write the same tokens")


def uses_template(tokenizer: Any, prompts: Sequence[Ids]) -> bool | None:
    """Whether prompts were written with a tokenizer's chat template; None if it leaves no trace.

    Traces are the special tokens that it puts around a message, or what it writes before and after
    one.

    Args:
        tokenizer: The teacher's.
        prompts: int32[P] each.
    """
    written = _written(tokenizer, [USER], {"add_generation_prompt": True})
    if not prompts or written is None:
        return None
    traces = [trace.strip() for trace in written.text.split(PROBE) if trace.strip()]
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    marks = {
        number
        for number, text in added.items()
        if text.strip() and any(text in trace for trace in traces)
    }
    marks -= {tokenizer.bos_token_id}
    if marks:
        return any(not marks.isdisjoint(prompt.tolist()) for prompt in prompts)
    if not traces:
        return None
    texts = [str(tokenizer.decode(prompt.tolist())) for prompt in prompts]
    return any(all(trace in text for trace in traces) for text in texts)


def first_difference(
    theirs: Any, ours: Any, conversations: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]
) -> str | None:
    """Where two tokenizers first write a conversation differently; None if nowhere.

    A template that refuses a conversation writes nothing; two that refuse it are equal there.
    """
    for name, (messages, options) in conversations.items():
        teachers, students = (
            _written(tokenizer, messages, options) for tokenizer in (theirs, ours)
        )
        if teachers != students:
            return f"{name} ({_shown(teachers, students)})"
    return None


def _finding(verdict: Any, sentence: str) -> Finding:
    return Finding("chat template", verdict, sentence)


@dataclass(frozen=True, slots=True)
class _Written:
    """What a template makes of a conversation."""

    ids: list[int]
    text: str = field(compare=False)


def _written(
    tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]
) -> _Written | None:
    """A conversation through the template; None where it refuses it.

    Content is given as text, or in parts to a template that reads nothing else.
    """
    for parts in (False, True):
        given = [_as_part(message) if parts else message for message in messages]
        with suppress(Exception):  # what a template raises may be anything
            text = str(tokenizer.apply_chat_template(given, tokenize=False, **options))
            if PROBE in text:
                ids = tokenizer.apply_chat_template(given, return_dict=False, **options)
                return _Written([int(token) for token in ids], text)
    return None


def _as_part(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _shown(theirs: _Written | None, ours: _Written | None) -> str:
    """Both texts from shortly before their first difference."""
    if theirs is None or ours is None:
        refusing = "the teacher's" if theirs is None else "the student's"
        return f"{refusing} refuses it, the other does not"
    pairs = zip(theirs.text, ours.text, strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    start = max(0, same - SHOWN_CHARACTERS // 4)
    shown = [repr(written.text[start : start + SHOWN_CHARACTERS]) for written in (theirs, ours)]
    return f"the labels have {shown[0]} where the student has {shown[1]}"
