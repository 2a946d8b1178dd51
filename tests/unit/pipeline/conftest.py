"""Projects of a tiny teacher that is never run: config, tokenizer and weights of a few bytes."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.config import load_config
from pipeline.project import Project

WORDS = [f"w{number}" for number in range(28)]
CONTEXT = 32


@pytest.fixture(scope="session")
def teacher_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every word is a token: <s> and </s>, then w0 to w27; the embedding has 32 rows."""
    directory = tmp_path_factory.mktemp("teacher")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32,
        "max_position_embeddings": CONTEXT,
    }
    (directory / "config.json").write_text(json.dumps(config))
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    save_file({"lm_head.weight": np.zeros((32, 2), np.float32)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def write_prompts(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes rows, or plain prompts, to a JSONL file of ``tmp_path``."""

    def write(name: str, rows: Sequence[str | dict[str, Any]]) -> Path:
        path = tmp_path / f"{name}.jsonl"
        documents = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in documents))
        return path

    return write


@pytest.fixture
def project_file(
    tmp_path: Path, teacher_directory: Path, write_prompts: Callable[..., Path]
) -> Path:
    """A YAML file whose four train prompts and two held-out prompts are beside it."""
    write_prompts("train", ["w1", "w1 w2", "w1 w2 w3", "w1 w2 w3 w4"])
    write_prompts("heldout", ["w5", "w6 w7"])
    tree = {
        "name": "tiny",
        "store": str(tmp_path / "labels"),
        "runs": str(tmp_path / "runs"),
        "data": {
            "train": [{"path": str(tmp_path / "train.jsonl")}],
            "heldout": [{"path": str(tmp_path / "heldout.jsonl")}],
        },
        "teacher": {"model": str(teacher_directory), "dtype": "float32"},
        "label": {"sampling": {"max_tokens": 10}, "kind": {"type": "topk", "k": 4}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def open_project(project_file: Path) -> Callable[..., Project]:
    """A function that loads the project with overrides."""

    def load(*overrides: str) -> Project:
        return Project(load_config(project_file, overrides), Console(quiet=True))

    return load
