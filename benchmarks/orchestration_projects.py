"""Projects that the orchestration benchmark runs: many prompts, or small models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

VOCABULARY = 4096
PROMPT_TOKENS = 32
"""Mean length of a pre-tokenised prompt; they are evenly spread between half and one and a half."""
AT_ONCE = 100_000


def make_prompts(path: Path, count: int) -> None:
    """A JSONL file of pre-tokenised prompts."""
    random = np.random.default_rng(0)
    with path.open("w") as stream:
        for start in range(0, count, AT_ONCE):
            lengths = random.integers(
                PROMPT_TOKENS // 2, PROMPT_TOKENS * 3 // 2, min(AT_ONCE, count - start)
            )
            ids = random.integers(2, VOCABULARY, lengths.sum()).tolist()
            place = 0
            for length in lengths.tolist():
                stream.write(f'{{"input_ids": {ids[place : place + length]}}}\n')
                place += length


def write_project(folder: Path, model: Path, **sections: Any) -> Path:
    """A project of the prompts that lie beside it."""
    if not (folder / "heldout.jsonl").exists():
        (folder / "heldout.jsonl").write_text("")
    tree = {
        "name": "bench",
        "store": str(folder / "labels"),
        "runs": str(folder / "runs"),
        "data": {s: [{"path": str(folder / f"{s}.jsonl")}] for s in ("train", "heldout")},
        **sections,
    }
    tree["teacher"] = {"model": str(model), "dtype": "float32", **tree["teacher"]}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    words = {"<s>": 0, "</s>": 1, **{f"w{n}": n for n in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def make_empty_model(directory: Path) -> Path:
    """A teacher that can be planned for and never runs."""
    from safetensors.numpy import save_file

    write_tokenizer(directory)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": np.zeros((32, 2), np.float32)}, directory / "model.safetensors")
    return directory


def make_model(directory: Path, *, layers: int, hidden_size: int) -> Path:
    """A Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(layers)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def make_small_project(folder: Path, *, prompts: int, students: int, layers: int = 4) -> Path:
    """A project of a small teacher that answers, and of students that differ in one setting."""
    folder.mkdir(parents=True, exist_ok=True)
    make_prompts(folder / "train.jsonl", prompts)
    make_prompts(folder / "heldout.jsonl", 4)
    model = make_model(folder / "teacher", layers=layers, hidden_size=256)
    student = make_model(folder / "student", layers=1, hidden_size=128)
    weights = {f"s{n}": {"loss": {"weight": {"soft_weight": n / 10}}} for n in range(students)}
    return write_project(
        folder,
        model,
        teacher={"backend": {"type": "transformers"}},
        label={"sampling": {"max_tokens": 32}, "kind": {"k": 32}, "qa": {"enabled": False}},
        train={
            "model": str(student),
            "dtype": "float32",
            "batch": {"tokens": 2048, "micro_tokens": 2048},
        },
        students=weights,
        evaluate={"generations": 0},
        cluster={"cpus": 2},
    )
