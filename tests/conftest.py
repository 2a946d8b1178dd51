"""What holds for every test: the folder is its tier, and nothing leaves the machine.

The fixtures make tiny real models and a project around them; heavy imports stay inside them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Set at import, before any test module imports a library that reads them.
HAS_GPU = Path("/dev/nvidiactl").exists()
for name, value in {
    # Triton programs are compiled for a GPU, or interpreted; triton decides when it is imported
    "TRITON_INTERPRET": "0" if HAS_GPU else "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "AWS_EC2_METADATA_DISABLED": "true",
}.items():
    os.environ.setdefault(name, value)

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")

TIMEOUT_S = {"unit": 60, "integration": 600, "e2e": 900, "soak": 3600, "browser": 120}
"""Tier, which is a folder and a marker, and how long one of its tests may take by default."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        tier = item.path.relative_to(root).parts[0]
        if tier not in TIMEOUT_S:
            raise pytest.UsageError(
                f"{item.nodeid}: tests live in tests/{{{','.join(TIMEOUT_S)}}}/"
            )
        item.add_marker(tier)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S[tier]))
        if item.get_closest_marker("gpu") is not None and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


REPOSITORY = Path(__file__).parent.parent
VOCAB_SIZE = 384
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights (float32) and a byte-level tokenizer."""
    return make_model(tmp_path_factory.mktemp("models") / "teacher", layers=2, seed=0)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama of the teacher's family."""
    return make_model(tmp_path_factory.mktemp("models") / "student", layers=1, seed=1)


def make_model(directory: Path, *, layers: int, seed: int) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,  # more rows than the tokenizer has ids: a padded vocabulary
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.3,  # peaked enough that the distributions differ between positions
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


WORDS = (
    "why",
    "how",
    "sun",
    "moon",
    "bread",
    "river",
    "glass",
    "music",
    "winter",
    "honest",
    "light",
)


@pytest.fixture
def project_file(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> Path:
    """A project of tiny models: 24 training prompts, 6 held-out, reference teacher."""
    for split, start, count in (("train", 0, 24), ("heldout", 100, 6)):
        rows = [
            {"id": f"{split}-{n}", "messages": [{"role": "user", "content": prompt_text(n)}]}
            for n in range(start, start + count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
name: tiny
store: {tmp_path}/labels
runs: {tmp_path}/runs
data:
  train: [{{path: {tmp_path}/train.jsonl}}]
  heldout: [{{path: {tmp_path}/heldout.jsonl}}]
teacher:
  model: {tiny_teacher}
  backend: {{type: transformers}}
  dtype: float32
label:
  sampling: {{max_tokens: 12}}
  kind: {{k: 16}}
  commit_samples: 4
train:
  model: {tiny_student}
  optimizer: {{lr: 3.0e-3}}
  batch: {{tokens: 160, micro_tokens: 160}}
  dtype: float32
  epochs: 3
students:
  hard: {{loss.weight.soft_weight: 0.0}}
evaluate: {{generations: 2, max_new_tokens: 4}}
cluster: {{cpus: 2}}
"""
    )
    return path


def prompt_text(number: int) -> str:
    return f"{WORDS[number % len(WORDS)]} {WORDS[(number * 7) % len(WORDS)]} {number}"


Distill = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def distill() -> Distill:
    """Run ``python -m pipeline`` with arguments from the repository; returns the ended process."""

    def run(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "COLUMNS": "200"},
            timeout=600,
            check=False,
        )
        assert done.returncode == expect, f"{done.stdout}\n{done.stderr}"
        return done

    return run
