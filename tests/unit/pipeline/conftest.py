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

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.project import Project
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

WORDS = [f"w{number}" for number in range(28)]
CONTEXT = 32
Capture = pytest.CaptureFixture[str]


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


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two commits of a made-up teacher: three samples of 5 tokens, then two of 4."""
    root = tmp_path / "store"
    spec = make_spec()
    label_set = LabelStore(str(root), create=True).create(spec, {"teacher": "./a-teacher"})
    label_set.append([make_sample(number, spec) for number in range(3)], {"host": "h1"})
    more = [make_sample(number, spec, num_tokens=4) for number in (3, 4)]
    label_set.append(more, {"host": "h2"})
    return root


@pytest.fixture
def as_json(capsys: Capture) -> Callable[..., Any]:
    """A function that runs a command with ``--json`` and returns its document."""

    def run(*words: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([*words, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def flip_a_bit() -> Callable[[Path], None]:
    """A function that damages a file in its middle."""

    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    return flip
