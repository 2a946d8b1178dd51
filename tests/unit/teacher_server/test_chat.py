"""Conversations become token ids: tools, roles, options, and what templates leave out."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from storage.keys import sample_key
from storage.selection import SampleRequest
from teacher_server.config import DataSource, LabelConfig
from teacher_server.prompts import read_prompts, select_samples
from tests.unit.teacher_server.chat_templates import (
    ALPACA,
    CALL,
    CALLED,
    CHATML,
    LLAMA3,
    OUTPUT,
    PARTS,
    PHI3,
    QWEN3,
    SCORE,
    TRAJECTORY,
    TWO_TURNS,
    WEATHER,
    Row,
    Sample,
    WithTemplate,
    answer,
    labelled,
    prompt_of,
    system,
    user,
)
from tests.unit.teacher_server.chat_templates import sample as sample
from tests.unit.teacher_server.chat_templates import with_template as with_template


# -- tools ----------------------------------------------------------------------------------------
def test_calls_are_labelled_and_output_of_tools_never(
    with_template: WithTemplate, sample: Sample
) -> None:
    tokenizer = with_template(CHATML)
    request = sample(tokenizer, {"messages": TRAJECTORY, "tools": [WEATHER]})
    assert labelled(request, tokenizer) == [
        f"<tool_call>{CALLED}</tool_call><|im_end|>",
        "It rains.<|im_end|>",
    ]
    assert '"name": "weather"' in prompt_of(request, tokenizer)
    assert isinstance(request, SampleRequest)
    assert 'RAIN "9 C"' in tokenizer.decode(request.response_ids_R)


def test_calls_and_output_in_the_way_of_llama(with_template: WithTemplate, sample: Sample) -> None:
    tokenizer = with_template(LLAMA3)
    request = sample(tokenizer, {"messages": TRAJECTORY, "tools": [WEATHER]})
    assert labelled(request, tokenizer) == [
        '{"name": "weather", "parameters": {"city": "Graz"}}<|im_end|>',
        "It rains.<|im_end|>",
    ]
    assert isinstance(request, SampleRequest)
    assert r"RAIN \"9 C\"" in tokenizer.decode(request.response_ids_R)


def test_a_call_without_an_end_of_turn_is_labelled_whole(
    with_template: WithTemplate, sample: Sample
) -> None:
    tokenizer = with_template(ALPACA)
    messages = [TRAJECTORY[0], answer("Let me see.", tool_calls=[CALL]), *TRAJECTORY[2:]]
    request = sample(tokenizer, {"messages": messages})
    assert labelled(request, tokenizer) == [f"Let me see. CALL {CALLED}", "It rains."]


def test_arguments_as_json_text_are_the_same_call(
    with_template: WithTemplate, sample: Sample
) -> None:
    text = {"type": "function", "function": {"name": "weather", "arguments": '{"city":"Graz"}'}}
    tokenizer = with_template(CHATML)
    rows = [{"messages": [user("?"), answer("", tool_calls=[call])]} for call in (CALL, text)]
    one, other = (sample(tokenizer, row) for row in rows)
    assert isinstance(one, SampleRequest)
    assert isinstance(other, SampleRequest)
    assert one.key == other.key


def test_no_content_beside_a_call_is_written_as_nothing(
    with_template: WithTemplate, sample: Sample
) -> None:
    """Never as "None", which this template would write of a null."""
    tokenizer = with_template(CHATML)
    missing = {"role": "assistant", "tool_calls": [CALL]}
    texts = {
        tuple(labelled(sample(tokenizer, {"messages": [user("?"), turn]}), tokenizer))
        for turn in (missing, answer(None, tool_calls=[CALL]), answer("", tool_calls=[CALL]))
    }
    assert texts == {(f"<tool_call>{CALLED}</tool_call><|im_end|>\n",)}


def test_tools_options_and_text_are_in_the_key_through_the_ids_only(
    with_template: WithTemplate, sample: Sample
) -> None:
    tokenizer = with_template(QWEN3)
    row = {"messages": [user("hi")]}

    def key(more: Row) -> str:
        request = sample(tokenizer, {**row, **more}, LabelConfig())
        assert isinstance(request, SampleRequest), request
        return request.key

    plain = key({})
    assert key({"chat_template_kwargs": {"enable_thinking": True}}) == plain
    assert key({"chat_template_kwargs": {"enable_thinking": False}}) != plain
    assert key({"tools": []}) == plain
    assert (
        key({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}) == plain
    )
    tokenizer.chat_template = "{{ tools | tojson if tools }}" + QWEN3
    assert key({"tools": [WEATHER]}) != plain
    assert key({"tools": json.dumps([WEATHER])}) == key({"tools": [WEATHER]})


# -- what templates leave out ---------------------------------------------------------------------
SILENT = (
    "{{ messages[0].content if messages[0].role == 'system' }}"
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|{{ m.role }}|>"
    "{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [user("?")], "tools": [WEATHER]}, "leaves out tools[0] ('weather')"),
        ({"messages": TRAJECTORY[:3]}, "leaves out the call of 'weather' of messages[1]"),
        (
            {"messages": [system(str(WEATHER)), *TRAJECTORY[:3]], "tools": [WEATHER]},
            "leaves out the call of 'weather' of messages[2]",
        ),
        (
            {"messages": [user("?"), answer("!"), OUTPUT]},
            "leaves out the content (role 'tool') of messages[2]",
        ),
        (
            {"messages": [{"role": "developer", "content": "Rhyme."}, user("?")]},
            "leaves out the content (role 'developer') of messages[0]",
        ),
    ],
    ids=str,
)
def test_what_a_template_leaves_out_without_a_word_is_refused(
    row: Row, expected: str, with_template: WithTemplate, sample: Sample
) -> None:
    tokenizer = with_template(SILENT)
    assert expected in str(sample(tokenizer, row, LabelConfig()))
    scored = {**row, "messages": [*row["messages"], answer("done")], "label_turns": "last"}
    assert expected in str(sample(tokenizer, scored))


def test_a_developer_is_written_where_the_template_knows_him(
    with_template: WithTemplate, sample: Sample
) -> None:
    tokenizer = with_template(CHATML)
    row = {"messages": [system("A"), {"role": "developer", "content": "B"}, user("?")]}
    prompt = prompt_of(sample(tokenizer, row, LabelConfig()), tokenizer)
    assert prompt.startswith(
        "<|im_start|>system\nA<|im_end|>\n<|im_start|>developer\nB<|im_end|>\n"
    )


def test_words_of_a_labelled_turn_that_the_template_leaves_out_are_refused(
    with_template: WithTemplate, sample: Sample
) -> None:
    messages = [user("?"), answer("Let me see.", tool_calls=[CALL]), OUTPUT, answer("It rains.")]
    problem = sample(with_template(LLAMA3), {"messages": messages})
    assert "leaves out content of messages[1]" in str(problem)
    # as context it is what the teacher would be given, too
    tokenizer = with_template(LLAMA3)
    request = sample(tokenizer, {"messages": messages, "label_turns": "last"})
    assert labelled(request, tokenizer) == ["It rains.<|im_end|>"]


def test_a_template_of_parts_is_given_parts(with_template: WithTemplate, sample: Sample) -> None:
    tokenizer = with_template(PARTS)
    request = sample(tokenizer, {"messages": [user("hi")]}, LabelConfig())
    assert prompt_of(request, tokenizer) == "User: hi<|im_end|>\nAssistant:"


# -- responses beside the messages ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>"), (PHI3, "<|im_end|>"), (ALPACA, "<|end|>")]
)
def test_a_completion_of_messages_ends_as_the_template_ends_a_turn(
    template: str, end: str, with_template: WithTemplate, sample: Sample
) -> None:
    """Without an end of turn it is the end-of-sequence token, which is another one in PHI3."""
    tokenizer = with_template(template)
    request = sample(tokenizer, {"messages": TWO_TURNS[:3], "completion": " TWO\n"})
    assert labelled(request, tokenizer) == [f" TWO\n{end}"]
    assert "ONE" in prompt_of(request, tokenizer)


def test_completion_ids_are_taken_as_they_are(with_template: WithTemplate, sample: Sample) -> None:
    tokenizer = with_template(CHATML)
    ids = [5, 6, 7, 8]
    for row, prompt in (
        ({"messages": [user("?")]}, "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"),
        ({"prompt": "?"}, "?"),
        ({"input_ids": tokenizer.encode("?")}, "?"),
    ):
        request = sample(tokenizer, {**row, "completion_ids": ids})
        assert prompt_of(request, tokenizer) == prompt
        assert isinstance(request, SampleRequest)
        assert request.response_ids_R is not None
        assert request.response_ids_R.tolist() == ids
        assert request.label_mask_R is None
        masked = sample(tokenizer, {**row, "completion_ids": ids, "label_mask": [0, 1, 1, 0]})
        assert isinstance(masked, SampleRequest)
        assert masked.label_mask_R is not None
        assert masked.label_mask_R.tolist() == [False, True, True, False]
        assert masked.key == sample_key(
            request.prompt_ids_P, 0, response_ids=ids, label_mask=[0, 1, 1, 0]
        )
        whole = sample(tokenizer, {**row, "completion_ids": ids, "label_mask": [1, True, 1, 1]})
        assert isinstance(whole, SampleRequest)
        assert whole.key == request.key
        assert whole.label_mask_R is None


# -- rows that are refused ------------------------------------------------------------------------
ROWS: dict[str, tuple[Row, str]] = {
    "unknown option": (
        {"messages": [user("?")], "chat_template_kwargs": {"enable_thinkin": True}},
        "chat_template_kwargs: the chat template knows no 'enable_thinkin'",
    ),
    "answer to nothing": ({"messages": [answer("!"), user("?"), answer("!")]}, "answer to nothing"),
    "call of many": (
        {"messages": [user("?"), answer("", tool_calls=[CALL, CALL]), OUTPUT, answer("!")]},
        "the chat template refused the messages: one call at a time",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_the_template_cannot_take_is_refused(
    name: str, with_template: WithTemplate, sample: Sample
) -> None:
    row, expected = ROWS[name]
    label = LabelConfig() if row["messages"][-1]["role"] == "user" else SCORE
    assert expected in str(sample(with_template(LLAMA3), row, label))


DOCS = Path(__file__).resolve().parents[3] / "docs" / "prompts.md"


@pytest.mark.parametrize("mode", ["generate", "score"])
def test_the_rows_that_the_docs_show_can_be_used(
    mode: str, with_template: WithTemplate, tmp_path: Path
) -> None:
    (section,) = (
        text
        for text in DOCS.read_text().split("\n## ")
        if text.partition("\n")[0].split(". ")[-1].lower().startswith(mode)
    )
    rows = [line for line in section.splitlines() if line.startswith("{")]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    prompts = read_prompts([DataSource(path=str(tmp_path / "p.jsonl"))], mode=mode)
    label = LabelConfig(mode=mode)  # type: ignore[arg-type]  # one of two
    requests = select_samples(
        prompts,
        with_template(CHATML),  # type: ignore[arg-type]
        label,
        context=10_000,
        vocab_size=10_000,
    ).requests
    assert prompts.bad == []
    assert len(requests) == len(rows) >= 4


def test_all_rows_of_the_list_are_read(with_template: WithTemplate, tmp_path: Path) -> None:
    """Templates are asked once per tokenizer and rows once each, in order."""
    rows: Sequence[Row] = [
        {"messages": TWO_TURNS},
        {"messages": TRAJECTORY},
        {"messages": TWO_TURNS},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts([DataSource(path=str(tmp_path / "p.jsonl"))], mode="score")
    requests = select_samples(
        prompts,
        with_template(CHATML),  # type: ignore[arg-type]
        SCORE,
        context=10_000,
        vocab_size=10_000,
    ).requests
    assert [[source.line for source in request.sources] for request in requests] == [[1, 3], [2]]
