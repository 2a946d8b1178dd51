"""How texts begin and end on both sides."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from student_train.preflight.ends import check_beginning, check_ending, end_ids
from student_train.preflight.subject import Endings
from student_train.preflight.vocabulary import check_special_tokens
from tests.unit.student_train.preflight_models import (
    chat_prompt,
    make_tokenizer,
    plain_prompt,
    save_model,
    subject_of,
)

EOS, IM_END = 1, 4


def generation_config(directory: Path, eos: Any) -> Path:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return directory


def test_an_added_beginning_on_one_side_is_refused_for_plain_text(tmp_path: Path) -> None:
    student = save_model(tmp_path / "student", adds_bos=True)
    teacher = save_model(tmp_path / "teacher")
    plain = plain_prompt(make_tokenizer())
    found = check_beginning(subject_of(student, teacher, plain))
    assert found.verdict == "refused"
    assert found.sentence == (
        "the teacher's tokenizer puts nothing around plain text, the student's '<bos>' before; "
        "set train.chat_template: teacher"
    )
    assert check_beginning(subject_of(student, student, plain)).verdict == "ok"
    forced = subject_of(student, teacher, plain, chat_template="teacher")
    assert check_beginning(forced).verdict == "ok"


def test_for_conversations_it_is_a_warning(tmp_path: Path) -> None:
    """The template writes its own beginning; other uses of the student still differ."""
    student = save_model(tmp_path / "student", adds_bos=True)
    teacher = save_model(tmp_path / "teacher")
    chat = chat_prompt(make_tokenizer())
    assert check_beginning(subject_of(student, teacher, chat)).verdict == "warning"


def test_a_student_that_would_not_end_is_told_how(tmp_path: Path) -> None:
    """A base model as student of an instruct model."""
    teacher = generation_config(save_model(tmp_path / "teacher"), [IM_END, EOS])
    student = generation_config(save_model(tmp_path / "student"), EOS)
    endings = Endings(Counter({IM_END: 9, EOS: 1}))
    found = check_ending(subject_of(student, teacher), endings)
    assert found.verdict == "warning"
    assert "cached responses end with '<|im_end|>' (4), where the student would go on" in (
        found.sentence
    )
    assert "eos_token_id in the student's generation_config.json" in found.sentence
    before_labels = check_ending(subject_of(student, teacher), None)
    assert (before_labels.verdict, "'<|im_end|>' (4)" in before_labels.sentence) == (
        "warning",
        True,
    )
    covered = subject_of(generation_config(student, [EOS, IM_END]), teacher)
    assert check_ending(covered, endings).verdict == "ok"


def test_responses_that_were_all_cut_ask_for_nothing(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    assert check_ending(subject_of(model, model), Endings()).verdict == "ok"


@pytest.mark.parametrize(
    ("file", "document", "expected"),
    [
        ("config.json", {"eos_token_id": 7}, {7}),
        ("config.json", {"text_config": {"eos_token_id": [7, 8]}}, {7, 8}),
        ("config.json", {}, set()),
        ("generation_config.json", {"eos_token_id": [3]}, {3}),
    ],
)
def test_ends_are_those_that_generation_uses(
    tmp_path: Path, file: str, document: dict[str, Any], expected: set[int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    (tmp_path / file).write_text(json.dumps(document))
    assert end_ids(tmp_path) == expected


def test_another_padding_token_is_harmless_and_another_end_is_not(tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher")
    padded = save_model(tmp_path / "padded", pad_token="<eos>")
    found = check_special_tokens(subject_of(padded, teacher))
    assert (found.verdict, "padding differs" in found.sentence) == ("ok", True)
    ended = save_model(tmp_path / "ended", eos_token="<eos>")
    found = check_special_tokens(subject_of(ended, teacher))
    assert found.verdict == "warning"
    assert "eos_token is '<|im_end|>' in the labels and '<eos>' in the student" in found.sentence
    forced = subject_of(ended, teacher, chat_template="teacher")
    assert check_special_tokens(forced).verdict == "ok"
