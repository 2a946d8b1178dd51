"""Text of prompt files reaches the tokenizer character by character, however unusual it is."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from storage.errors import InputError
from storage.selection import SampleRequest
from teacher_server.config import DataSource, LabelConfig
from teacher_server.prompts import Prompts, read_prompts, select_samples

Tokens = PreTrainedTokenizerFast
ANSWER = {"role": "assistant", "content": "yes"}
SCORE = LabelConfig(mode="score")


def user(content: object) -> dict[str, Any]:
    return {"role": "user", "content": content}


USER = user("hi")


def write(path: Path, rows: Sequence[object]) -> str:
    """A JSONL file; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def read(file: str, mode: str = "generate") -> Prompts:
    return read_prompts([DataSource(path=file)], mode=mode)


def problems(prompts: Prompts) -> list[str]:
    return [str(row) for row in prompts.bad]


def select(
    prompts: Prompts, tokenizer: Tokens, label: LabelConfig | None = None, *, context: int = 1000
) -> tuple[SampleRequest, ...]:
    selection = select_samples(
        prompts,
        tokenizer,  # type: ignore[arg-type]  # the protocol names less than transformers has
        label or LabelConfig(),
        context=context,
        vocab_size=261,
    )
    return tuple(selection.requests)


UNUSUAL = {
    "family joined by zero width": "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "flag": "\U0001f1e6\U0001f1f9",
    "combining": "e\u0301\u0323 \u1112\u1161\u11ab",
    "right to left": "\u202b\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627\u202c",
    "byte order mark": "\ufeffa\ufeff",
    "NUL": "\x00a\x00",
    "separators": "a\u2028b\u2029c\x85d\x0b\x0c",
    "edges of planes": "\uffff\U0010ffff\U00010000",
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_text_is_kept_character_by_character(
    tmp_path: Path, tokenizer: Tokens, name: str
) -> None:
    text = UNUSUAL[name]
    rows = [{"prompt": text, "completion": text}, {"messages": [user(text)], "completion": text}]
    # as it is, and as escapes
    data = [json.dumps(row, ensure_ascii=a).encode() for row in rows for a in (False, True)]
    file = write(tmp_path / "p.jsonl", data)
    given = select(read(file, mode="score"), tokenizer, SCORE)
    assert [len(request.sources) for request in given] == [2, 2]
    for request, prompt in zip(given, (text, f"<|user|>{text}<|end|><|assistant|>"), strict=True):
        assert tokenizer.decode(request.prompt_ids_P) == prompt
        assert request.response_ids_R is not None
        assert tokenizer.decode(request.response_ids_R) == f"{text}<|end|>"


def test_a_signed_file_loses_its_signature_only(tmp_path: Path, tokenizer: Tokens) -> None:
    rows = [b'\xef\xbb\xbf{"prompt": "a"}', '{"prompt": "\ufeffb"}'.encode()]
    prompts = read(write(tmp_path / "p.jsonl", rows))
    texts = [tokenizer.decode(request.prompt_ids_P) for request in select(prompts, tokenizer)]
    assert texts == ["a", "\ufeffb"]


def test_text_parts_are_joined_by_line_breaks(tmp_path: Path, tokenizer: Tokens) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows = [{"messages": [user(parts)]}, {"messages": [user("a\nb")]}]
    (request,) = select(read(write(tmp_path / "p.jsonl", rows)), tokenizer)
    assert len(request.sources) == 2


def test_an_empty_output_of_a_tool_is_content(tmp_path: Path, tokenizer: Tokens) -> None:
    rows = [{"messages": [USER, ANSWER, {"role": "tool", "content": ""}]}]
    (request,) = select(read(write(tmp_path / "p.jsonl", rows)), tokenizer)
    assert tokenizer.decode(request.prompt_ids_P).endswith("<|tool|><|end|><|assistant|>")


def test_nulls_of_parquet_are_fields_that_are_not_there(tmp_path: Path) -> None:
    """Arrow gives all calls of a file the same arguments, null where a call has none."""

    def row(arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"function": {"name": "f", "arguments": arguments}}
        turn = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {"messages": [user("a"), turn, user("b")]}

    rows = [row({"city": "Graz"}), row({"day": "today"})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    prompts = read(str(tmp_path / "p.parquet"))
    assert problems(prompts) == []
    arguments = [
        found.conversation.messages[1]["tool_calls"][0]["function"]["arguments"]
        for found in prompts.rows
        if found.conversation is not None
    ]
    assert arguments == [{"city": "Graz"}, {"day": "today"}]
    # a null of JSON is a value
    kept = read(write(tmp_path / "p.jsonl", [row({"city": None})])).rows[0].conversation
    assert kept is not None
    assert kept.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": None}


def test_a_parquet_file_with_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    broken = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=r"p\.parquet' cannot be read"):
        read(str(tmp_path / "p.parquet"))


def test_switches_of_turns_mean_nothing_where_the_teacher_answers(
    tmp_path: Path, tokenizer: Tokens
) -> None:
    switched = {**ANSWER, "train": False, "weight": 0}
    rows = [{"messages": [USER, turn, USER]} for turn in (ANSWER, switched)]
    prompts = read(write(tmp_path / "p.jsonl", rows))
    (request,) = select(prompts, tokenizer)
    assert len(request.sources) == 2
    conversation = prompts.rows[1].conversation
    assert conversation is not None
    assert conversation.messages[1] == ANSWER  # they never reach the template


def test_a_prompt_far_beyond_the_context_is_named_with_both_lengths(
    tmp_path: Path, tokenizer: Tokens
) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"messages": [user("word " * 100_000)]}])
    prompts = read(file)
    assert len(select(prompts, tokenizer, context=4096)) == 1
    expected = f"{file}:2: prompt of 500003 tokens do not fit the teacher's context of 4096"
    assert problems(prompts)[0].startswith(expected)
