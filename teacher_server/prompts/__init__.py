"""From prompt files to a selection: read, check, tokenize, key. ``docs/prompts.md`` has examples.

Nothing is dropped silently. Every row that cannot be used becomes a ``BadRow`` that names file and
line; by default they stop the job before any teacher call.

| module | what it does |
|---|---|
| ``files`` | rows of JSONL and Parquet files and of saved datasets |
| ``rows`` | one row checked: which prompt, which response |
| ``messages`` | one conversation checked: messages, tools, which turns are labelled |
| ``chat`` | a conversation as token ids, through the chat template |
| ``turns`` | which of these tokens the assistant wrote |
| ``samples`` | checked rows to samples with their keys |
"""

from teacher_server.prompts.bad_rows import BadRow
from teacher_server.prompts.chat import Tokenizer
from teacher_server.prompts.rows import PromptRow, Prompts, read_prompts, stream_prompts
from teacher_server.prompts.samples import select_samples

__all__ = [
    "BadRow",
    "PromptRow",
    "Prompts",
    "Tokenizer",
    "read_prompts",
    "select_samples",
    "stream_prompts",
]
