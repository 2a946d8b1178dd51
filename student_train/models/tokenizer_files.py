"""What lies beside the weights of a model: its tokenizer and how text is generated with it."""

import shutil
from pathlib import Path

from transformers import GenerationConfig

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "chat_template*", "additional_chat_templates"),
)
"""Patterns of the files that say how a conversation becomes token ids."""

GENERATION_CONFIG = "generation_config.json"


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the tokenizer of a model and its chat template, byte for byte.

    Loading and saving it would write what a version of transformers makes of it.
    """
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_dir():
                shutil.copytree(file, directory / file.name)
            else:
                shutil.copyfile(file, directory / file.name)


def generation_config(source: Path, *, ends_like: Path | None = None) -> GenerationConfig:
    """How a model generates, in a form that transformers agrees to save.

    Args:
        source: Directory of the model. Without a ``generation_config.json`` the ids of special
            tokens in its config are taken.
        ends_like: Directory of another model whose end-of-sequence ids are taken instead.
    """
    config = _load(source)
    if ends_like is not None:
        config.eos_token_id = _load(ends_like).eos_token_id
    if _is_consistent(config):
        return config
    # as published with some models: a temperature, but sampling is not switched on
    config.do_sample = True
    if _is_consistent(config):
        return config
    return GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)


def _load(directory: Path) -> GenerationConfig:
    known = (directory / GENERATION_CONFIG).is_file()
    return GenerationConfig.from_pretrained(
        directory, GENERATION_CONFIG if known else "config.json", local_files_only=True
    )


def _is_consistent(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
