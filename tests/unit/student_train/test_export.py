"""The exported student is a plain directory that loads, with its facts in the card."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from student_train.export import export_student, render_model_card

MakeModel = Callable[..., LlamaForCausalLM]
SaveStudent = Callable[..., Path]
CARD = {"student": "hybrid", "teacher": "./teacher", "label set": "a" * 32}


def tensor_names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as weights:
        return set(weights.keys())


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_with_the_trained_weights_in_bfloat16(
    tmp_path: Path, tiny_model: MakeModel, save_student: SaveStudent, tied: bool
) -> None:
    source = save_student(tmp_path / "untrained", tie_word_embeddings=tied)
    trained = tiny_model(tie_word_embeddings=tied)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.125
    expected = {name: tensor.bfloat16() for name, tensor in trained.state_dict().items()}
    export_student(trained, source=source, output=tmp_path / "model", card=CARD)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.use_cache
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("tied", "stored"), [(True, False), (False, True)])
def test_a_tied_head_is_not_stored_twice(
    tmp_path: Path, tiny_model: MakeModel, save_student: SaveStudent, tied: bool, stored: bool
) -> None:
    source = save_student(tmp_path / "untrained", tie_word_embeddings=tied)
    model = tiny_model(tie_word_embeddings=tied)
    export_student(model, source=source, output=tmp_path / "model", card=CARD)
    names = tensor_names(tmp_path / "model")
    assert ("lm_head.weight" in names) == stored
    assert "model.embed_tokens.weight" in names


def test_tokenizer_template_and_generation_settings_come_from_the_untrained_student(
    tmp_path: Path, tiny_model: MakeModel, save_student: SaveStudent
) -> None:
    source = save_student(tmp_path / "untrained")
    file = source / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [1, 5]}))
    export_student(tiny_model(), source=source, output=tmp_path / "model", card=CARD)
    found, wanted = (AutoTokenizer.from_pretrained(d) for d in (tmp_path / "model", source))
    assert found.get_vocab() == wanted.get_vocab()
    assert found.chat_template == wanted.chat_template
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 5]


def test_the_directory_holds_a_card_with_the_facts(
    tmp_path: Path, tiny_model: MakeModel, save_student: SaveStudent
) -> None:
    source = save_student(tmp_path / "untrained")
    export_student(tiny_model(), source=source, output=tmp_path / "model", card=CARD)
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for name, value in CARD.items():
        assert f"| {name} | {value} |\n" in card


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, tiny_model: MakeModel) -> None:
    (tmp_path / "no-tokenizer").mkdir()
    with pytest.raises((OSError, ValueError)):
        export_student(
            tiny_model(), source=tmp_path / "no-tokenizer", output=tmp_path / "model", card=CARD
        )
    assert [path.name for path in tmp_path.iterdir()] == ["no-tokenizer"]


def test_text_cannot_break_the_table_of_a_card() -> None:
    card = render_model_card({"student": "a|b", "command": "one\ntwo"})
    assert "| student | a\\|b |\n" in card
    assert "| command | one two |\n" in card
