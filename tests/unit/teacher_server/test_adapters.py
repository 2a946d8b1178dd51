"""LoRA adapters: what is read of them, and what is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from storage.errors import ConfigError, DistillError
from storage.fingerprint import DigestMemo, fingerprint_model
from storage.keys import TeacherFingerprint, key_of
from teacher_server.adapters import read_adapter
from teacher_server.errors import TeacherError

HIDDEN, WIDE, RANK, VOCAB_SIZE = 8, 12, 3, 20
PREFIX = "base_model.model."
QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
WEIGHTS = {
    f"{QUERY}.weight": (HIDDEN, HIDDEN),
    f"{DOWN}.weight": (HIDDEN, WIDE),
    "model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN),
    "lm_head.weight": (VOCAB_SIZE, HIDDEN),
}
PAIRS = {
    f"{PREFIX}{QUERY}.lora_A.weight": (2, HIDDEN),
    f"{PREFIX}{QUERY}.lora_B.weight": (HIDDEN, 2),
    f"{PREFIX}{DOWN}.lora_A.weight": (RANK, WIDE),
    f"{PREFIX}{DOWN}.lora_B.weight": (HIDDEN, RANK),
}
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "rank_pattern": {"down_proj": RANK},
    "lora_alpha": 4,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "base_model_name_or_path": "somewhere",
}


def write(directory: Path, name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    random = np.random.default_rng(0)
    tensors = {n: random.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    save_file(tensors, directory / name)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Headers of two files, as a model in pieces has them."""
    directory = tmp_path / "model"
    directory.mkdir()
    names = list(WEIGHTS)
    for number, part in enumerate((names[:2], names[2:])):
        write(directory, f"model-{number}.safetensors", {name: WEIGHTS[name] for name in part})
    (directory / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
    return directory


MakeAdapter = Callable[..., Path]


@pytest.fixture
def adapter(tmp_path: Path) -> MakeAdapter:
    """A function that writes an adapter; None leaves a tensor or an entry out."""

    def make(tensors: dict[str, tuple[int, ...] | None] | None = None, **entries: object) -> Path:
        directory = tmp_path / "adapter"
        directory.mkdir(exist_ok=True)
        shapes = {n: s for n, s in {**PAIRS, **(tensors or {})}.items() if s is not None}
        write(directory, "adapter_model.safetensors", shapes)
        (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **entries}))
        return directory

    return make


def test_modules_and_the_largest_rank_are_read(adapter: MakeAdapter, model: Path) -> None:
    found = read_adapter(str(adapter()), str(model))
    assert found.rank == RANK
    assert found.modules == {QUERY, DOWN}
    assert found.module_names == ["down_proj", "q_proj"]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": None}, "peft_type None"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules of its own"),
        ({"trainable_token_indices": [1]}, "token embeddings"),
        ({"layer_replication": [[0, 2]]}, "repeated layers"),
        ({"target_parameters": ["experts"]}, "not those of linear layers"),
        ({"init_lora_weights": "pissa"}, r"the model's own weights \(pissa\)"),
    ],
)
def test_what_is_more_than_lora_is_refused(
    adapter: MakeAdapter, model: Path, entries: dict[str, object], words: str
) -> None:
    with pytest.raises(TeacherError, match=f"is more than LoRA: it has .*{words}.*; merge it"):
        read_adapter(str(adapter(**entries)), str(model))


@pytest.mark.parametrize("start", [True, False, "gaussian"])
def test_how_the_training_began_does_not_matter(
    adapter: MakeAdapter, model: Path, start: object
) -> None:
    assert read_adapter(str(adapter(init_lora_weights=start)), str(model)).rank == RANK


HEAD = {
    f"{PREFIX}lm_head.lora_A.weight": (2, HIDDEN),
    f"{PREFIX}lm_head.lora_B.weight": (VOCAB_SIZE, 2),
}
EMBEDDING = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": (2, VOCAB_SIZE),
    f"{PREFIX}model.embed_tokens.lora_embedding_B": (HIDDEN, 2),
}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (HEAD, "changes lm_head, whose 20 rows are the vocabulary"),
        (EMBEDDING, "changes the vocabulary: it holds .*lora_embedding_A"),
        ({f"{PREFIX}model.embed_tokens.weight": (21, HIDDEN)}, "changes the vocabulary"),
        ({f"{PREFIX}{QUERY}.lora_magnitude_vector": (8,)}, "is more than LoRA: it holds"),
        ({f"{PREFIX}{QUERY}.lora_B.weight": None}, f"damaged: {QUERY} has"),
        ({f"{PREFIX}{QUERY}.lora_B.weight": (HIDDEN, 3)}, f"damaged: {QUERY} has"),
        ({f"{PREFIX}{QUERY}.lora_A.weight": (2, 16)}, r"adds \[8, 16\] to .*q_proj, which is \[8"),
        (
            {
                f"{PREFIX}model.layers.7.mlp.down_proj.lora_A.weight": (2, WIDE),
                f"{PREFIX}model.layers.7.mlp.down_proj.lora_B.weight": (HIDDEN, 2),
            },
            r"another model: it changes model\.layers\.7\.mlp\.down_proj, which .* does not have",
        ),
        (dict.fromkeys(PAIRS), "holds no matrices at all"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    adapter: MakeAdapter, model: Path, tensors: dict[str, Any], words: str
) -> None:
    with pytest.raises(TeacherError, match=words):
        read_adapter(str(adapter(tensors)), str(model))


def test_of_a_quantised_model_layers_have_other_names(adapter: MakeAdapter, model: Path) -> None:
    (model / "model-0.safetensors").unlink()
    with pytest.raises(TeacherError, match="does not have"):
        read_adapter(str(adapter()), str(model))
    quantised = {"vocab_size": VOCAB_SIZE, "quantization_config": {"quant_method": "gptq"}}
    (model / "config.json").write_text(json.dumps(quantised))
    assert read_adapter(str(adapter()), str(model)).rank == RANK


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_directory_that_peft_did_not_write_is_refused(
    adapter: MakeAdapter, model: Path, file: str
) -> None:
    directory = adapter()
    path = directory / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DistillError, match="cannot be read"):
        read_adapter(str(directory), str(model))
    path.unlink()
    with pytest.raises(TeacherError, match=f"as peft saves it: {file} missing"):
        read_adapter(str(directory), str(model))


# -- identity -------------------------------------------------------------------------------------
def test_every_byte_of_an_adapter_is_part_of_the_fingerprint(
    adapter: MakeAdapter, model: Path
) -> None:
    plain = fingerprint_model(model, DigestMemo(None))
    assert plain.adapters == ()
    directory = adapter()

    def key() -> str:
        found = fingerprint_model(model, DigestMemo(None), adapter=directory)
        assert found.model_copy(update={"adapters": ()}) == plain
        return key_of(found)

    first = key()
    assert first != key_of(plain)
    adapter(base_model_name_or_path="elsewhere", peft_version="0.1")  # its origin
    assert key() == first
    adapter(lora_alpha=5)
    changed = key()
    weights = directory / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert len({first, changed, key()}) == 3
    weights.unlink()
    with pytest.raises(ConfigError, match="holds no adapter_model"):
        key()


def test_a_teacher_without_adapter_keeps_its_key() -> None:
    """Written with an earlier release."""
    found = TeacherFingerprint(weights="w" * 32, config="c" * 32)
    assert key_of(found) == "b1072fb8dce30ef071b4b32debb2b2cc"
