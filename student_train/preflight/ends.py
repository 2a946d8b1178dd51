"""How texts begin, and how responses end."""

import json
from pathlib import Path
from typing import Any

from student_train.preflight.findings import Finding
from student_train.preflight.subject import Endings, Subject
from student_train.preflight.template import uses_template

PROBE = "quartz"
WAY_OUT = "set train.chat_template: teacher"


def check_beginning(subject: Subject) -> Finding:
    """Both tokenizers put the same tokens around plain text, such as one for its beginning."""
    name = "beginning of text"
    if subject.gets_teachers_tokenizer:
        return Finding(name, "ok", "the exported student gets the teacher's tokenizer")
    theirs, ours = (_around(t) for t in (subject.teacher_tokenizer, subject.student_tokenizer))
    if theirs == ours:
        return Finding(name, "ok", f"both put {_named(theirs)} around plain text")
    sentence = (
        f"the teacher's tokenizer puts {_named(theirs)} around plain text, the student's "
        f"{_named(ours)}; {WAY_OUT}"
    )
    plain = bool(subject.prompts) and uses_template(subject.teacher_tokenizer, subject.prompts) in (
        False,
        None,
    )
    return Finding(name, "refused" if plain else "warning", sentence)


def check_ending(subject: Subject, endings: Endings | None) -> Finding:
    """The student, when it writes, ends where the teacher did.

    Args:
        subject: The student.
        endings: Of cached responses; None before labelling, where the teacher's ends are taken.
    """
    name = "end of response"
    if subject.gets_teachers_tokenizer:
        return Finding(name, "ok", "the exported student ends where the teacher ends")
    ends = end_ids(subject.student)
    if endings is None:
        wanted = end_ids(subject.teacher)
        source = "the teacher ends at"
    else:
        wanted = set(endings.tokens)
        source = "cached responses end with"
    if not wanted:
        return Finding(name, "ok", "no response that was looked at ended by itself")
    missing = sorted(wanted - ends)
    if not missing:
        return Finding(name, "ok", f"{source} {_tokens(subject, wanted)}; so does the student")
    return Finding(
        name,
        "warning",
        f"{source} {_tokens(subject, missing)}, where the student would go on writing; add it to "
        f"eos_token_id in the student's generation_config.json, or {WAY_OUT}",
    )


def end_ids(directory: Path) -> set[int]:
    """Tokens at which a model directory says that generation ends."""
    for file in ("generation_config.json", "config.json"):
        path = directory / file
        document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        ends = document.get("eos_token_id", document.get("text_config", {}).get("eos_token_id"))
        if ends is not None:
            return {int(end) for end in (ends if isinstance(ends, list) else [ends])}
    return set()


def _around(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Tokens before and after a plain text."""
    plain = tokenizer.encode(PROBE, add_special_tokens=False)
    found = tokenizer.encode(PROBE, add_special_tokens=True)
    start = next((n for n in range(len(found)) if found[n : n + len(plain)] == plain), len(found))
    before, after = found[:start], found[start + len(plain) :]
    return tokenizer.convert_ids_to_tokens(before), tokenizer.convert_ids_to_tokens(after)


def _named(around: tuple[list[str], list[str]]) -> str:
    before, after = (" ".join(map(repr, tokens)) for tokens in around)
    if not before and not after:
        return "nothing"
    return " and ".join(
        text for text in (before and f"{before} before", after and f"{after} behind") if text
    )


def _tokens(subject: Subject, ids: Any) -> str:
    return ", ".join(
        f"{subject.teacher_tokenizer.convert_ids_to_tokens(number)!r} ({number})"
        for number in sorted(ids)
    )
