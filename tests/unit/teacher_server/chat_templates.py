"""Chat templates, messages and what the tests of conversations share.

The templates are cut down from those of model families; the tokenizer knows every byte.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from storage.selection import SampleRequest
from teacher_server.config import DataSource, LabelConfig
from teacher_server.prompts import read_prompts, select_samples

Tokens = PreTrainedTokenizerFast
Row = dict[str, Any]
Sample = Callable[..., SampleRequest | str]
WithTemplate = Callable[[str], Tokens]
SCORE = LabelConfig(mode="score")

# -- templates ------------------------------------------------------------------------------------
CHATML = """\
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""As SmolLM2 and Qwen2.5: a line break behind every end of turn. Any role is written."""

GENERATION = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{%- else %}{{ m.content }}<|im_end|>{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""As the training templates of TRL: the template says what an assistant writes."""

LLAMA3 = """\
{%- for m in messages %}<|im_start|>{{ 'ipython' if m.role == 'tool' else m.role }}<|header_end|>

{% if m.tool_calls is defined %}
{{- raise_exception('one call at a time') if m.tool_calls | length != 1 }}
{%- set f = m.tool_calls[0].function %}
{{- {'name': f.name, 'parameters': f.arguments} | tojson }}
{%- elif m.role == 'tool' %}{{ m.content | tojson }}
{%- elif m.role == 'user' and tools and loop.first %}{{ tools | tojson }}

{{ m.content }}
{%- else %}{{ m.content }}{% endif %}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant<|header_end|>

{% endif %}"""
"""As Llama 3.1: tools in the first user turn, output as a JSON string, words beside a call lost."""

QWEN3 = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}{% set ns.last = messages.index(m) %}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) -%}
<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
"""As Qwen3: only what follows the last question of the user keeps its thinking."""

R1 = """\
{%- for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}
{%- else %}<|assistant|>{{ m.content.split('</think>') | last }}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|><think>
{% endif %}"""
"""As DeepSeek-R1: the prompt opens the thinking, the answer is written without it."""

PHI3 = """\
{%- for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% else %}<|end|>{% endif %}"""
"""As Phi-3: an end of text behind the whole conversation."""

ALPACA = """\
{%- for m in messages %}### {{ m.role }}:
{{ m.content }}
{%- for call in m.tool_calls or [] %} CALL {{ call.function | tojson }}{% endfor %}

{% endfor %}
{%- if add_generation_prompt %}### assistant:
{% endif %}"""
"""No special token at all."""

PARTS = """\
{%- for m in messages %}{{ m.role | capitalize }}:{% for part in m.content %}
{%- if part.type == 'text' %} {{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""
"""As SmolVLM: content is read as a list of parts only."""

HEADERLESS = """\
{%- for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}
{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}
{%- if m.role != 'tool' %}<|im_end|>{% endif %}{% endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}<|im_start|>assistant
{% endif %}"""
"""As an early Gemma 4: no generation prompt behind the output of a tool."""

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|header_end|>", "<|user|>", "<|assistant|>", "<|end|>"]

# -- messages -------------------------------------------------------------------------------------
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}
CALL = {
    "type": "function",
    "id": "c1",
    "function": {"name": "weather", "arguments": {"city": "Graz"}},
}
CALLED = '{"name": "weather", "arguments": {"city": "Graz"}}'
OUTPUT = {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": 'RAIN "9 C"'}


def system(content: str) -> Row:
    return {"role": "system", "content": content}


def user(content: str) -> Row:
    return {"role": "user", "content": content}


def answer(content: str | None, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


TWO_TURNS = [user("one?"), answer("ONE"), user("two?"), answer("TWO")]
TRAJECTORY = [user("Rain?"), answer(None, tool_calls=[CALL]), OUTPUT, answer("It rains.")]


@pytest.fixture(scope="module")
def with_template(tokenizer: Tokens) -> Callable[[str], Tokens]:
    """A function that gives the tokenizer of bytes a template and its special tokens."""

    def make(template: str) -> Tokens:
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>"
        )
        made.add_special_tokens({"additional_special_tokens": SPECIAL})
        made.add_tokens(["<tool_call>", "</tool_call>"])
        made.chat_template = template
        return made

    return make


@pytest.fixture
def sample(tmp_path: Path) -> Callable[..., SampleRequest | str]:
    """A function that reads one row: its sample, or what is wrong with it."""

    def read(tokenizer: Tokens, row: Row, label: LabelConfig = SCORE) -> SampleRequest | str:
        (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
        prompts = read_prompts([DataSource(path=str(tmp_path / "p.jsonl"))], mode=label.mode)
        selection = select_samples(
            prompts,
            tokenizer,  # type: ignore[arg-type]  # the protocol names less than transformers has
            label,
            context=10_000,
            vocab_size=10_000,
        )
        if prompts.bad:
            assert not selection.requests
            return prompts.bad[0].problem
        (request,) = selection.requests
        assert request.is_genuine
        return request

    return read


def prompt_of(request: SampleRequest | str, tokenizer: Tokens) -> str:
    assert isinstance(request, SampleRequest), request
    return str(tokenizer.decode(request.prompt_ids_P))


def labelled(request: SampleRequest | str, tokenizer: Tokens) -> list[str]:
    """Text of every run of labelled tokens."""
    assert isinstance(request, SampleRequest), request
    ids_R, mask_R = request.response_ids_R, request.label_mask_R
    assert ids_R is not None
    if mask_R is None:
        return [str(tokenizer.decode(ids_R))]
    assert mask_R.dtype == np.bool_
    assert not mask_R.all()  # a mask that holds all is none, so that equal samples have one key
    edges = np.flatnonzero(np.diff(mask_R, prepend=False, append=False))
    return [
        str(tokenizer.decode(ids_R[begin:end]))
        for begin, end in zip(edges[::2], edges[1::2], strict=True)
    ]
