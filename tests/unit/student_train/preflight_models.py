"""Students and teachers without weights: a config and a tokenizer, in the style of families."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from student_train.config import TrainConfig
from student_train.preflight.subject import Ids, Subject

SPECIAL = ["<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = len(SPECIAL) + 256

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_IN_OTHER_WORDS = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{- message['content'] + '<|im_end|>' + '\n' -}}{%- endfor -%}"
    "{{- '<|im_start|>assistant\n' if add_generation_prompt -}}"
)
CHATML_WITH_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}" + CHATML
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    + CHATML
)
NO_SPECIAL_TOKENS = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
TRACELESS = "{% for m in messages %}{{ m.content }} {% endfor %}"
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, intermediate_size=24, max_position_embeddings=64),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "qwen": Qwen2Config(
        **SHAPE, intermediate_size=24, num_key_value_heads=1, max_position_embeddings=64
    ),
    "gemma": Gemma2Config(
        **SHAPE,
        intermediate_size=24,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=8,
        tie_word_embeddings=True,
    ),
}


def make_tokenizer(
    *,
    template: str | None = CHATML,
    adds_bos: bool = False,
    digits: bool = False,
    extra: tuple[str, ...] = (),
    **special: Any,
) -> PreTrainedTokenizerFast:
    """Every byte is a token, behind five special ones.

    Args:
        template: Chat template.
        adds_bos: Whether plain text begins with ``<bos>``.
        digits: Whether the tokenizer puts "12" into one token.
        extra: More tokens.
        special: Changes of bos_token, eos_token, pad_token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet, *extra, "12"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2")] if digits else []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    names = {"bos_token": "<bos>", "eos_token": "<|im_end|>", "pad_token": "<pad>", **special}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    made.chat_template = template
    return made


def save_model(
    directory: Path, family: str = "llama", *, changes: dict[str, Any] | None = None, **tokens: Any
) -> Path:
    """Write config and tokenizer; ``changes`` go into the config, ``tokens`` to the tokenizer."""
    settings = {"vocab_size": VOCAB_SIZE + 1, "eos_token_id": 4, **(changes or {})}
    config = FAMILIES[family].to_dict() | settings
    type(FAMILIES[family])(**config).save_pretrained(directory)
    make_tokenizer(**tokens).save_pretrained(directory)
    return directory


def chat_prompt(tokenizer: PreTrainedTokenizerFast, text: str = "Why?") -> Ids:
    """A prompt as the tokenizer's template writes it."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return np.array(ids, dtype=np.int32)


def plain_prompt(tokenizer: PreTrainedTokenizerFast, text: str = "Why?") -> Ids:
    """A prompt of plain text."""
    return np.array(tokenizer.encode(text), dtype=np.int32)


def subject_of(student: Path, teacher: Path, *prompts: Ids, **train: Any) -> Subject:
    """A student that is to learn from a teacher's labels."""
    settings = TrainConfig.model_validate({"model": str(student), **train})
    return Subject(settings, student, teacher, VOCAB_SIZE + 1, prompts=prompts)
