"""Teacher labels and tiny students for the tests of this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 40
"""Tokens of the tiny tokenizer."""
PADDED_VOCAB = 48
"""Rows of the tiny model's embedding."""

SaveModel = Callable[..., Path]


def tiny_config(**changes: object) -> LlamaConfig:
    """Three layers, hidden size 16."""
    settings = {
        "vocab_size": PADDED_VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    return LlamaConfig(**settings)  # type: ignore[arg-type]  # one dict of many types


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """A function that makes a random model; keyword arguments change its config."""

    def make(**changes: object) -> LlamaForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(tiny_config(**changes)).eval()

    return make


@pytest.fixture
def save_model(tiny_llama: Callable[..., LlamaForCausalLM]) -> SaveModel:
    """A function that writes a random model with its tokenizer and returns the directory."""

    def save(directory: Path, **changes: object) -> Path:
        tiny_llama(**changes).save_pretrained(directory)
        write_tokenizer(directory)
        return directory

    return save


def write_tokenizer(directory: Path, *, swapped: bool = False) -> None:
    """A word-level tokenizer of VOCAB tokens; ``swapped`` exchanges the ids of two of them."""
    vocabulary = {"<s>": 0, "</s>": 1, **{f"w{number}": number for number in range(2, VOCAB)}}
    if swapped:
        vocabulary["w7"], vocabulary["w8"] = 8, 7
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="</s>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(directory)
