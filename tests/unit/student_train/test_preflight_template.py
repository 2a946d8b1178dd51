"""Chat templates are compared by what they write, where the labels were made with one."""

from collections.abc import Callable
from pathlib import Path

import pytest

from student_train.preflight.findings import Finding
from student_train.preflight.template import check_template, uses_template
from tests.unit.student_train.preflight_models import (
    CHATML,
    CHATML_IN_OTHER_WORDS,
    CHATML_WITH_DEFAULT_SYSTEM,
    NO_SPECIAL_TOKENS,
    NO_SYSTEM,
    PARTS,
    TRACELESS,
    chat_prompt,
    make_tokenizer,
    plain_prompt,
    save_model,
    subject_of,
)

Check = Callable[..., Finding]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """A function that compares two templates, for labels whose prompts were written with one."""

    def run(theirs: str | None, ours: str | None, *, plain: bool = False, **train: str) -> Finding:
        teacher = make_tokenizer(template=theirs)
        prompt = plain_prompt(teacher) if plain else chat_prompt(teacher)
        return check_template(
            subject_of(
                save_model(tmp_path / "student", template=ours),
                save_model(tmp_path / "teacher", template=theirs),
                prompt,
                **train,
            )
        )

    return run


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, NO_SPECIAL_TOKENS, TRACELESS])
def test_a_template_fits_itself(check: Check, template: str) -> None:
    """Also where it refuses system turns, on both sides."""
    assert check(template, template).verdict == "ok"


def test_other_words_for_the_same_rendering_fit(check: Check) -> None:
    assert check(CHATML, CHATML_IN_OTHER_WORDS).verdict == "ok"


def test_content_in_parts_is_compared_with_plain_content(check: Check) -> None:
    assert check(CHATML, PARTS).verdict == "ok"


def test_another_template_is_refused_with_a_way_out(check: Check) -> None:
    found = check(CHATML, NO_SPECIAL_TOKENS)
    assert found.verdict == "refused"
    assert "differs from the labels' in a question" in found.sentence
    assert "'<|im_start|>user" in found.sentence
    assert "'### user" in found.sentence
    assert found.sentence.endswith("set train.chat_template: teacher")


def test_a_default_system_turn_is_a_difference(check: Check) -> None:
    """As between Qwen2.5 and Qwen2.5-Instruct, whose templates look alike."""
    found = check(CHATML, CHATML_WITH_DEFAULT_SYSTEM)
    assert found.verdict == "refused"
    assert "system" in found.sentence


def test_a_template_that_refuses_what_the_other_writes_differs(check: Check) -> None:
    found = check(CHATML, NO_SYSTEM)
    assert found.verdict == "refused"
    assert "a system turn (the student's refuses it" in found.sentence


def test_a_student_without_template_is_refused(check: Check) -> None:
    found = check(CHATML, None)
    assert found.verdict == "refused"
    assert "has no chat template" in found.sentence
    assert found.sentence.endswith("set train.chat_template: teacher")


@pytest.mark.parametrize("ours", [NO_SPECIAL_TOKENS, None])
def test_with_the_teachers_template_any_student_fits(check: Check, ours: str | None) -> None:
    assert check(CHATML, ours, chat_template="teacher").verdict == "ok"


@pytest.mark.parametrize("ours", [NO_SPECIAL_TOKENS, None])
def test_labels_of_plain_text_need_no_template(check: Check, ours: str | None) -> None:
    assert check(CHATML, ours, plain=True).verdict == "ok"


def test_a_teacher_without_template_needs_none(check: Check) -> None:
    assert check(None, CHATML, plain=True).verdict == "ok"


def test_whether_a_traceless_template_was_used_is_not_known(check: Check) -> None:
    assert check(TRACELESS, CHATML).verdict == "warning"


def test_a_difference_in_tools_alone_is_a_warning(check: Check) -> None:
    with_tools = (
        "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}" + CHATML
    )
    found = check(with_tools, CHATML)
    assert found.verdict == "warning"
    assert "a tool" in found.sentence


@pytest.mark.parametrize("template", [CHATML, NO_SPECIAL_TOKENS, PARTS])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_use_of_a_template_is_read_off_the_tokens(template: str, adds_bos: bool) -> None:
    tokenizer = make_tokenizer(template=template, adds_bos=adds_bos)
    if template != PARTS:
        assert uses_template(tokenizer, [plain_prompt(tokenizer), chat_prompt(tokenizer)]) is True
    assert uses_template(tokenizer, [plain_prompt(tokenizer)]) is False
    assert uses_template(tokenizer, []) is None
