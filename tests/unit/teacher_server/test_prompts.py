"""Prompt files become samples; every row that cannot be used is named by file and line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from storage.errors import InputError
from storage.keys import sample_key
from storage.selection import SampleRequest
from teacher_server.config import DataSource, LabelConfig, SamplingConfig
from teacher_server.prompts import Prompts, read_prompts, select_samples

Tokens = PreTrainedTokenizerFast
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}
VOCAB_SIZE = 261


def user(content: object) -> dict[str, Any]:
    return {"role": "user", "content": content}


SCORE = LabelConfig(mode="score")


def write(path: Path, rows: Sequence[object]) -> str:
    """A JSONL file; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def read(*files: str, mode: str = "generate") -> Prompts:
    return read_prompts([DataSource(path=file) for file in files], mode=mode)


def problems(prompts: Prompts) -> list[str]:
    return [str(row) for row in prompts.bad]


def select(
    prompts: Prompts,
    tokenizer: Tokens,
    label: LabelConfig | None = None,
    *,
    context: int = 1000,
    vocab_size: int = VOCAB_SIZE,
) -> tuple[SampleRequest, ...]:
    selection = select_samples(
        prompts,
        tokenizer,  # type: ignore[arg-type]  # the protocol names less than transformers has
        label or LabelConfig(),
        context=context,
        vocab_size=vocab_size,
    )
    return tuple(selection.requests)


# -- good rows ------------------------------------------------------------------------------------
def test_messages_are_rendered_by_the_chat_template(tmp_path: Path, tokenizer: Tokens) -> None:
    rows = [{"messages": [{"role": "system", "content": "Be kind."}, USER]}]
    (request,) = select(read(write(tmp_path / "p.jsonl", rows)), tokenizer)
    text = tokenizer.decode(request.prompt_ids_P)
    assert text == "<|system|>Be kind.<|end|><|user|>hi<|end|><|assistant|>"
    # every special token is one token: 5 of them, 8 + 2 bytes
    assert len(request.prompt_ids_P) == 15
    assert request.response_ids_R is None


def test_a_plain_prompt_is_encoded_without_a_template(tmp_path: Path, tokenizer: Tokens) -> None:
    (request,) = select(read(write(tmp_path / "p.jsonl", [{"prompt": "abc"}])), tokenizer)
    assert request.prompt_ids_P.tolist() == tokenizer.encode("abc")


def test_token_ids_are_taken_as_they_are(tmp_path: Path, tokenizer: Tokens) -> None:
    rows = [{"input_ids": [7, 0, 260]}]
    (request,) = select(read(write(tmp_path / "p.jsonl", rows)), tokenizer)
    assert request.prompt_ids_P.tolist() == [7, 0, 260]
    assert request.prompt_ids_P.dtype == np.int32
    assert request.key == sample_key([7, 0, 260], 0)


def test_rows_keep_their_file_line_and_id(tmp_path: Path, tokenizer: Tokens) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "a", "id": "x"}, b"", {"prompt": "b", "id": 3}])
    first, second = (request.sources[0] for request in select(read(file), tokenizer))
    assert (first.file, first.line, first.id) == (file, 1, "x")
    assert (second.file, second.line, second.id) == (file, 3, "3")  # the empty line counts


def test_a_row_without_an_id_is_named_by_its_place(tmp_path: Path, tokenizer: Tokens) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    assert select(read(file), tokenizer)[0].sources[0].id == f"{file}:1"


def test_other_columns_are_left_alone(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "domain": "math", "completion": "unused when the teacher answers"}]
    assert read(write(tmp_path / "p.jsonl", rows)).bad == []


def test_files_are_read_in_the_given_order(tmp_path: Path, tokenizer: Tokens) -> None:
    one = write(tmp_path / "1.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    other = write(tmp_path / "2.ndjson", [{"prompt": "c"}])
    texts = [tokenizer.decode(r.prompt_ids_P) for r in select(read(other, one), tokenizer)]
    assert texts == ["c", "a", "b"]


def test_equal_prompts_with_different_ids_are_one_sample_with_two_sources(
    tmp_path: Path, tokenizer: Tokens
) -> None:
    rows = [
        {"id": "a", "prompt": "same"},
        {"id": "b", "prompt": "other"},
        {"id": "c", "prompt": "same"},
    ]
    requests = select(read(write(tmp_path / "p.jsonl", rows)), tokenizer)
    assert [[source.id for source in r.sources] for r in requests] == [["a", "c"], ["b"]]


def test_every_response_to_a_prompt_is_a_sample_of_its_own(
    tmp_path: Path, tokenizer: Tokens
) -> None:
    label = LabelConfig(sampling=SamplingConfig(samples_per_prompt=3))
    file = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    requests = select(read(file), tokenizer, label)
    assert [r.sample_index for r in requests] == [0, 1, 2, 0, 1, 2]
    assert len({r.key for r in requests}) == 6


def test_a_sample_is_the_same_in_another_file_and_order(tmp_path: Path, tokenizer: Tokens) -> None:
    one = select(read(write(tmp_path / "1.jsonl", [{"prompt": "a"}, {"prompt": "b"}])), tokenizer)
    other = select(read(write(tmp_path / "2.jsonl", [{"prompt": "b"}, {"prompt": "a"}])), tokenizer)
    assert [r.key for r in one] == [r.key for r in reversed(other)]


def test_parquet_rows_are_read_like_lines(tmp_path: Path, tokenizer: Tokens) -> None:
    rows = [
        {"id": "x", "messages": [USER], "prompt": None},
        {"id": "y", "messages": None, "prompt": "plain"},
        {"id": "z", "messages": None, "prompt": None},
    ]
    file = str(tmp_path / "p.parquet")
    pq.write_table(pa.Table.from_pylist(rows), file)
    prompts = read(file)
    assert [row.source.id for row in prompts.rows] == ["x", "y"]
    assert prompts.bad[0].line == 3
    assert len(select(prompts, tokenizer)) == 2


def test_a_saved_dataset_is_read_like_lines(tmp_path: Path, tokenizer: Tokens) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([{"prompt": "a", "id": 1}, {"prompt": " ", "id": 2}])
    dataset.save_to_disk(str(tmp_path / "d"))
    prompts = read(str(tmp_path / "d"))
    assert [tokenizer.decode(r.prompt_ids_P) for r in select(prompts, tokenizer)] == ["a"]
    assert problems(prompts) == [f"{tmp_path / 'd'}:2: prompt must be non-empty text, got ' '"]


def test_a_saved_dataset_of_several_splits_is_refused_naming_one(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list([{"prompt": "a"}])
    datasets.DatasetDict(train=part, test=part).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(InputError, match=r"several splits \['test', 'train'\]; name one, such as"):
        read(str(tmp_path / "d"))


# -- bad rows -------------------------------------------------------------------------------------
BAD_ROWS: dict[str, tuple[object, str]] = {
    "no JSON": (b'{"prompt": "a"', "not valid JSON: Expecting ',' delimiter at column 15"),
    "no UTF-8": (b'{"prompt": "\xff"}', "not valid UTF-8: invalid start byte at byte 12"),
    "half a character": (b'{"prompt": "\\ud83d"}', "half of a surrogate pair"),
    "no object": (["prompt"], "a row must be a JSON object, got list"),
    "no prompt": ({"id": "a", "text": "x"}, r"exactly one of .*; found \['id', 'text'\]"),
    "empty row": ({}, "found nothing"),
    "two prompts": ({"prompt": "a", "messages": [USER]}, r"found \['messages', 'prompt'\]"),
    "empty prompt": ({"prompt": " \n"}, "prompt must be non-empty text"),
    "null prompt": ({"prompt": None}, "prompt must be non-empty text, got None"),
    "number as prompt": ({"prompt": 3}, "prompt must be non-empty text, got 3"),
    "empty id": ({"prompt": "a", "id": None}, "id must be text or a whole number, got None"),
    "boolean id": ({"prompt": "a", "id": True}, "id must be text or a whole number, got True"),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion must be non-empty text"),
    "no messages": ({"messages": []}, "messages must be a non-empty list"),
    "text as messages": ({"messages": "hi"}, "messages must be a non-empty list, got 'hi'"),
    "text as message": ({"messages": ["hi"]}, r"messages\[0\] must be an object, got 'hi'"),
    "unknown role": ({"messages": [{"role": "human", "content": "a"}]}, r"\.role must be one of"),
    "empty content": ({"messages": [{"role": "user", "content": ""}]}, r"\[0\]\.content must be"),
    "list as content": ({"messages": [{"role": "user", "content": ["a"]}]}, r"\.content must be"),
    "object as content": ({"messages": [{"role": "user", "content": {}}]}, r"\.content must be"),
    "blank content": ({"messages": [{"role": "user", "content": " \n\u3000"}]}, "non-empty text"),
    "blank parts": ({"messages": [user([{"type": "text", "text": " "}])]}, "non-empty text"),
    "image": (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]},
        r"content\[0\] is of type 'image_url'; only parts of type 'text' can be labelled",
    ),
    "number as text": ({"messages": [user([{"type": "text", "text": 3}])]}, "part 0 is"),
    "null answer": (
        {"messages": [USER, {"role": "assistant", "content": None}, USER]},
        "non-empty",
    ),
    "null output": (
        {"messages": [USER, {"role": "tool", "content": None}]},
        "must be text, got None",
    ),
    "late developer": (
        {"messages": [USER, {"role": "developer", "content": "a"}, USER]},
        "only the first message may be of the developer",
    ),
    "text as calls": (
        {"messages": [USER, {**ANSWER, "tool_calls": "f()"}, USER]},
        "must be a list",
    ),
    "nameless call": (
        {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {}}]}, USER]},
        r"messages\[1\]\.tool_calls\[0\] must be .*function",
    ),
    "text as arguments": (
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{a"}]}, USER]},
        "arguments must be an object, or JSON text of one, got '{a'",
    ),
    "number as reasoning": (
        {"messages": [USER, {**ANSWER, "reasoning_content": 3}, USER]},
        r"messages\[1\]\.reasoning_content must be text",
    ),
    "object as tools": ({"messages": [USER], "tools": {"name": "f"}}, "tools must be a list"),
    "nameless tool": ({"messages": [USER], "tools": [{"type": "function"}]}, r"tools\[0\] must be"),
    "broken tools": ({"messages": [USER], "tools": "[{"}, "tools is text and not valid JSON"),
    "list as options": ({"messages": [USER], "chat_template_kwargs": [1]}, "must be an object"),
    "reserved option": (
        {"messages": [USER], "chat_template_kwargs": {"tools": [], "tokenize": True}},
        "may not set tokenize, tools",
    ),
    "tools of a text": (
        {"prompt": "a", "tools": [{"name": "f"}]},
        "tools go with messages, not with",
    ),
    "endless number": (
        b'{"input_ids": [' + b"1" * 5000 + b"]}",
        "not valid JSON: Exceeds the limit",
    ),
    "endless nesting": (b'{"prompt": ' + b"[" * 100_000, "not valid JSON: nested too deeply"),
    "half a character in a tool": (
        b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "\\udc00"}]}',
        "half of a surrogate pair",
    ),
    "late system": ({"messages": [USER, {"role": "system", "content": "a"}]}, "only the first"),
    "assistant last": ({"messages": [USER, ANSWER]}, "must be of user or tool in generate mode"),
    "no user": ({"messages": [{"role": "tool", "content": "a"}]}, "hold no user message"),
    "empty ids": ({"input_ids": []}, "input_ids must be a non-empty list"),
    "text ids": ({"input_ids": ["1"]}, "input_ids must be whole numbers >= 0"),
    "negative ids": ({"input_ids": [1, -1]}, "input_ids must be whole numbers >= 0"),
    "boolean ids": ({"input_ids": [True]}, "input_ids must be whole numbers >= 0"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, name: str) -> None:
    row, expected = BAD_ROWS[name]
    file = write(tmp_path / "p.jsonl", [{"prompt": "good"}, row, {"prompt": "also good"}])
    prompts = read(file)
    assert len(prompts.rows) == 2
    with pytest.raises(InputError, match=expected) as caught:
        prompts.require_all_good()
    assert f"{file}:2: " in str(caught.value)
    assert "data.on_bad_row" in str(caught.value)


def test_a_surrogate_pair_is_one_good_character(tmp_path: Path, tokenizer: Tokens) -> None:
    file = write(tmp_path / "p.jsonl", [b'{"prompt": "\\ud83e\\udd8a"}'])
    assert tokenizer.decode(select(read(file), tokenizer)[0].prompt_ids_P) == "\U0001f98a"


def test_an_id_that_is_used_twice_names_both_places(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", [{"prompt": "a", "id": "x"}])
    other = write(tmp_path / "2.jsonl", [{"prompt": "b"}, {"prompt": "c", "id": "x"}])
    assert problems(read(one, other)) == [f"{other}:2: id 'x' is already used at {one}:1"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"input_ids": [1] * 10}, "prompt of 10 tokens do not fit the teacher's context of 10"),
        ({"input_ids": [5, 261]}, "token id 261 leaves the vocabulary of 261"),
        ({"input_ids": [2**40]}, f"token id {2**40} leaves the vocabulary of 261"),
    ],
    ids=str,
)
def test_a_row_that_does_not_fit_the_teacher_turns_bad(
    tmp_path: Path, tokenizer: Tokens, row: dict[str, Any], expected: str
) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "good"}, row])
    prompts = read(file)
    assert len(select(prompts, tokenizer, context=10)) == 1
    assert len(prompts.bad) == 1
    assert str(prompts.bad[0]).startswith(f"{file}:2: {expected}")


def test_a_prompt_that_leaves_room_for_one_token_fits(tmp_path: Path, tokenizer: Tokens) -> None:
    prompts = read(write(tmp_path / "p.jsonl", [{"input_ids": [1] * 9}]))
    assert len(select(prompts, tokenizer, context=10)) == 1


def test_messages_that_the_template_refuses_turn_bad(tmp_path: Path, tokenizer: Tokens) -> None:
    file = write(tmp_path / "p.jsonl", [{"messages": [USER]}])
    refusing = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    refusing.chat_template = "{{ raise_exception('no system here') }}"
    prompts = read(file)
    assert select(prompts, refusing) == ()
    expected = f"{file}:1: the chat template refused the messages: no system here"
    assert problems(prompts) == [expected]


def test_a_tokenizer_without_a_template_refuses_messages_only(
    tmp_path: Path, tokenizer: Tokens
) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    prompts = read(write(tmp_path / "p.jsonl", [{"messages": [USER]}, {"prompt": "a"}]))
    assert len(select(prompts, plain)) == 1
    assert "the chat template refused the messages" in problems(prompts)[0]


def test_good_rows_can_be_used_beside_bad_ones(tmp_path: Path, tokenizer: Tokens) -> None:
    """``on_bad_row: skip``: the caller does not ask for all to be good, and lists the bad."""
    prompts = read(write(tmp_path / "p.jsonl", [{"prompt": "a"}, b"{", {"prompt": "b"}]))
    assert len(select(prompts, tokenizer)) == 2
    assert len(prompts.bad) == 1


def test_all_good_rows_raise_nothing(tmp_path: Path) -> None:
    read(write(tmp_path / "p.jsonl", [{"prompt": "a"}])).require_all_good()


def test_many_bad_rows_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    prompts = read(write(tmp_path / "p.jsonl", [b"{"] * 25))
    with pytest.raises(InputError, match="25 unusable rows") as caught:
        prompts.require_all_good()
    assert str(caught.value).count("not valid JSON") == 20
    assert "... and 5 more" in str(caught.value)


# -- bad files ------------------------------------------------------------------------------------
def test_a_missing_file_is_named_with_the_directory_it_was_looked_for_in(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl' does not exist \(read from /"):
        read(str(tmp_path / "none.jsonl"))


def test_a_file_of_an_unknown_kind_is_refused_naming_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt\na\n")
    with pytest.raises(InputError, match=r"unknown kind; use \.jsonl, \.parquet or the directory"):
        read(str(tmp_path / "p.csv"))


def test_a_directory_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match="is not a dataset saved to disk"):
        read(str(tmp_path))


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"p\.parquet' cannot be read"):
        read(str(tmp_path / "p.parquet"))


# -- score mode -----------------------------------------------------------------------------------
def test_a_completion_is_the_response_and_ends_with_the_end_token(
    tmp_path: Path, tokenizer: Tokens
) -> None:
    rows = [{"prompt": "ask", "completion": " tell"}]
    (request,) = select(read(write(tmp_path / "p.jsonl", rows), mode="score"), tokenizer, SCORE)
    assert tokenizer.decode(request.prompt_ids_P) == "ask"
    assert request.response_ids_R is not None
    assert tokenizer.decode(request.response_ids_R) == " tell<|end|>"
    assert request.key == sample_key(request.prompt_ids_P, 0, response_ids=request.response_ids_R)


def test_the_last_assistant_message_is_the_response(tmp_path: Path, tokenizer: Tokens) -> None:
    messages = [USER, ANSWER, USER, {"role": "assistant", "content": "no"}]
    rows = [{"messages": messages, "label_turns": "last"}]
    (request,) = select(read(write(tmp_path / "p.jsonl", rows), mode="score"), tokenizer, SCORE)
    prompt = "<|user|>hi<|end|><|assistant|>yes<|end|><|user|>hi<|end|><|assistant|>"
    assert tokenizer.decode(request.prompt_ids_P) == prompt
    assert request.response_ids_R is not None
    assert tokenizer.decode(request.response_ids_R) == "no<|end|>"


def test_two_completions_of_one_prompt_are_two_samples(tmp_path: Path, tokenizer: Tokens) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}]
    prompts = read(write(tmp_path / "p.jsonl", rows), mode="score")
    assert len({r.key for r in select(prompts, tokenizer, SCORE)}) == 2


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, "score mode needs a completion"),
        ({"input_ids": [1]}, "score mode needs a completion"),
        ({"messages": [USER]}, "the last message must be of assistant in score mode"),
        ({"messages": [USER, ANSWER], "completion": "x"}, "not both"),
        ({"messages": [USER, ANSWER], "completion_ids": [1]}, "not both"),
        ({"messages": [{"role": "system", "content": "a"}], "completion": "x"}, "no user message"),
        ({"prompt": "a", "completion": "x", "completion_ids": [1]}, "not both"),
        ({"prompt": "a", "completion_ids": []}, "completion_ids must be a non-empty list"),
        ({"prompt": "a", "completion_ids": [1, -1]}, "completion_ids must be whole numbers >= 0"),
        (
            {"prompt": "a", "completion": "x", "label_mask": [1]},
            "label_mask goes with completion_ids",
        ),
        (
            {"prompt": "a", "completion_ids": [1, 2], "label_mask": [1]},
            "1 entries for the 2 tokens",
        ),
        ({"prompt": "a", "completion_ids": [1, 2], "label_mask": [0, 2]}, "a list of 0 and 1"),
        ({"prompt": "a", "completion_ids": [1, 2], "label_mask": "11"}, "a list of 0 and 1"),
        ({"prompt": "a", "completion_ids": [1, 2], "label_mask": [0, 0]}, "no token to label"),
        ({"messages": [USER, {**ANSWER, "train": False}]}, "no assistant turn is left to label"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"messages[1].weight must be true or"),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, r"messages[1].train must be true or"),
        ({"messages": [USER, {**ANSWER, "train": True, "weight": 0}]}, "contradict each other"),
        ({"messages": [USER, ANSWER], "label_turns": "first"}, "must be 'all' or 'last'"),
        (
            {"messages": [USER, {**ANSWER, "train": False}, USER, ANSWER], "label_turns": "last"},
            "use one of them",
        ),
    ],
    ids=str,
)
def test_a_row_without_one_response_is_bad(
    tmp_path: Path, row: dict[str, Any], expected: str
) -> None:
    assert expected in problems(read(write(tmp_path / "p.jsonl", [row]), mode="score"))[0]


def test_a_prompt_with_its_completion_leaves_room_for_one_more_token(
    tmp_path: Path, tokenizer: Tokens
) -> None:
    """vLLM refuses a prompt as long as its context, also where it only scores.

    3 tokens of prompt, 4 of completion and its end: 8, so a context of 9 fits and 8 does not.
    """
    file = write(tmp_path / "p.jsonl", [{"prompt": "abc", "completion": "defg"}])
    assert len(select(read(file, mode="score"), tokenizer, SCORE, context=9)) == 1
    prompts = read(file, mode="score")
    assert select(prompts, tokenizer, SCORE, context=8) == ()
    assert "prompt and completion of 8 tokens do not fit" in problems(prompts)[0]


def test_a_completion_whose_tokens_leave_the_vocabulary_is_bad(
    tmp_path: Path, tokenizer: Tokens
) -> None:
    rows = [{"input_ids": [1], "completion": "<|tool|>"}]  # the last special token has id 260
    prompts = read(write(tmp_path / "p.jsonl", rows), mode="score")
    assert select(prompts, tokenizer, SCORE, vocab_size=260) == ()
    assert "token id 260 leaves the vocabulary of 260" in problems(prompts)[0]


def test_a_template_that_rewrites_earlier_turns_is_refused(
    tmp_path: Path, tokenizer: Tokens
) -> None:
    """The prompt would not be a prefix of the conversation, so no token could be a response."""
    rewriting = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    rewriting.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    prompts = read(write(tmp_path / "p.jsonl", [{"messages": [USER, ANSWER]}]), mode="score")
    assert select(prompts, rewriting, SCORE) == ()
    assert "the chat template rewrites earlier turns" in problems(prompts)[0]


def test_a_response_that_the_template_leaves_out_is_bad(tmp_path: Path, tokenizer: Tokens) -> None:
    forgetful = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    forgetful.chat_template = "{{ messages[0].content }}"
    prompts = read(write(tmp_path / "p.jsonl", [{"messages": [USER, ANSWER]}]), mode="score")
    assert select(prompts, forgetful, SCORE) == ()
    assert "the chat template leaves out content of messages[1]" in problems(prompts)[0]
