"""The exported student is a plain directory that loads, with its facts in the card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from student_train.config import LabelSource, TrainConfig, TrainJob
from student_train.models.export import export_student, render_model_card
from student_train.models.gather import gather_weights
from student_train.models.lora import add_adapters
from student_train.models.student import prune_layers
from tests.unit.student_train.language_models import FAMILIES, make_model

MakeModel = Callable[..., LlamaForCausalLM]
SaveStudent = Callable[..., Path]
CARD = {"student": "hybrid", "teacher": "./teacher", "label set": "a" * 32}
IDS = torch.tensor([[3, 4, 5, 9, 2]])


def make_job(
    tmp_path: Path, source: Path, *, tokenizer: Path | None = None, **train: Any
) -> TrainJob:
    return TrainJob(
        labels=LabelSource(store="unused", label_set="a" * 32, selection="b" * 32),
        model=str(source),
        tokenizer=str(tokenizer or source),
        train=TrainConfig.model_validate({"model": str(source), **train}),
        output=str(tmp_path),
        card=CARD,
    )


def changed(model: Any) -> Any:
    """What training leaves behind: other weights, and settings that are for training alone."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.config.use_cache = False
    return model


def tensor_names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# -- weights --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_with_the_trained_weights(
    tmp_path: Path,
    tiny_model: MakeModel,
    save_student: SaveStudent,
    tied: bool,
    dtype: torch.dtype,
) -> None:
    source = save_student(tmp_path / "untrained", tie_word_embeddings=tied)
    trained = changed(tiny_model(tie_word_embeddings=tied))
    job = make_job(tmp_path, source, export_dtype=str(dtype).removeprefix("torch."))
    export_student(trained, job, facts={})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == loaded.config.dtype == dtype
    assert loaded.config.use_cache
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype)), name


@pytest.mark.parametrize(("tied", "stored"), [(True, False), (False, True)])
def test_a_tied_head_is_not_stored_twice(
    tmp_path: Path, tiny_model: MakeModel, save_student: SaveStudent, tied: bool, stored: bool
) -> None:
    source = save_student(tmp_path / "untrained", tie_word_embeddings=tied)
    model = tiny_model(tie_word_embeddings=tied)
    export_student(model, make_job(tmp_path, source), facts={})
    names = tensor_names(tmp_path / "model")
    assert ("lm_head.weight" in names) == stored
    assert "model.embed_tokens.weight" in names


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_is_exported_under_the_names_of_its_files(
    tmp_path: Path, save_student: SaveStudent, family: str
) -> None:
    """Experts, which are one tensor in memory, are stored one by one."""
    source = save_student(tmp_path / "untrained")
    (source / "model.safetensors").unlink()
    make_model(FAMILIES[family]).save_pretrained(source)
    model = changed(AutoModelForCausalLM.from_pretrained(source))
    export_student(model, make_job(tmp_path, source, export_dtype="float32"), facts={})
    assert tensor_names(tmp_path / "model") == tensor_names(source)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    found, wanted = (
        json.loads((d / "config.json").read_text()) for d in (tmp_path / "model", source)
    )
    assert found == wanted


def test_weights_are_gathered_once_for_all_their_names(tiny_model: MakeModel) -> None:
    model = tiny_model(tie_word_embeddings=True)
    weights = gather_weights(model, dtype=torch.bfloat16, keep=True)
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    assert set(weights) == set(model.state_dict())
    assert gather_weights(model, dtype=torch.bfloat16, keep=False) == {}
    same = gather_weights(model, dtype=torch.float32, keep=True)["model.norm.weight"]
    assert torch.equal(same, model.model.norm.weight)
    assert same.data_ptr() != model.model.norm.weight.data_ptr()  # training may go on


# -- adapters -------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "mixtral"])
@torch.no_grad()
def test_an_adapter_is_exported_by_itself_and_merged(
    tmp_path: Path, save_student: SaveStudent, family: str
) -> None:
    source = save_student(tmp_path / "untrained")
    make_model(FAMILIES[family]).save_pretrained(source)
    job = make_job(tmp_path, source, lora={"r": 4, "rslora": True}, export_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(source)
    assert job.train.lora is not None
    add_adapters(model, job.train.lora)
    expected = changed(model)(IDS).logits
    export_student(model, job, facts={})
    untrained = AutoModelForCausalLM.from_pretrained(source)
    assert float((untrained(IDS).logits - expected).abs().max()) > 0.01
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert tensor_names(tmp_path / "model") == tensor_names(source)
    adapted = PeftModel.from_pretrained(untrained, tmp_path / "adapter")
    torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(source)
    assert config["task_type"] == "CAUSAL_LM"
    assert '"r":4' in (tmp_path / "model" / "README.md").read_text()
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()


# -- what lies beside the weights -----------------------------------------------------------------
def test_tokenizer_template_and_generation_settings_come_from_the_untrained_student(
    tmp_path: Path, tiny_model: MakeModel, save_student: SaveStudent
) -> None:
    source = save_student(tmp_path / "untrained")
    change_json(source / "generation_config.json", eos_token_id=[1, 5])
    export_student(tiny_model(), make_job(tmp_path, source), facts={})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "model" / name).read_bytes() == (source / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 5]


def test_a_student_may_take_the_teachers_template_and_ends(
    tmp_path: Path, tiny_model: MakeModel, save_student: SaveStudent
) -> None:
    source, teacher = save_student(tmp_path / "untrained"), save_student(tmp_path / "teacher")
    template = "<{% for m in messages %}{{ m.content }}{% endfor %}>"
    (teacher / "chat_template.jinja").write_text(template)
    change_json(teacher / "generation_config.json", eos_token_id=[7, 1], temperature=0.6)
    job = make_job(tmp_path, source, tokenizer=teacher, chat_template="teacher")
    export_student(tiny_model(), job, facts={})
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == template
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [7, 1]
    assert "temperature" not in generation  # how the student samples is its own affair


@pytest.mark.parametrize("settings", [{"temperature": 0.6, "top_p": 0.9}, {"pad_token_id": -1}])
def test_settings_that_transformers_does_not_save_are_mended(
    tmp_path: Path, tiny_model: MakeModel, save_student: SaveStudent, settings: dict[str, float]
) -> None:
    """As some models were published; the end of a training is a bad time to refuse them."""
    source = save_student(tmp_path / "untrained")
    change_json(source / "generation_config.json", do_sample=False, eos_token_id=[1, 5], **settings)
    export_student(tiny_model(), make_job(tmp_path, source), facts={})
    prune_layers(source, (0,), tmp_path / "pruned")
    for directory in ("model", "pruned"):
        generation = json.loads((tmp_path / directory / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [1, 5]
        assert generation.get("temperature", 0.6) == 0.6
        assert generation.get("do_sample", False) == ("temperature" in settings)


def test_a_student_without_generation_settings_gets_those_of_its_config(
    tmp_path: Path, tiny_model: MakeModel, save_student: SaveStudent
) -> None:
    source = save_student(tmp_path / "untrained")
    (source / "generation_config.json").unlink()
    export_student(tiny_model(), make_job(tmp_path, source), facts={})
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 1


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, tiny_model: MakeModel) -> None:
    (tmp_path / "no-model").mkdir()
    with pytest.raises((OSError, ValueError)):
        export_student(tiny_model(), make_job(tmp_path, tmp_path / "no-model"), facts={})
    assert [path.name for path in tmp_path.iterdir()] == ["no-model"]


# -- the model card -------------------------------------------------------------------------------
def test_the_card_tells_facts_and_metrics(
    tmp_path: Path, tiny_model: MakeModel, save_student: SaveStudent
) -> None:
    source = save_student(tmp_path / "untrained")
    steps = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.25, "seconds": 1.0}]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(step) + "\n" for step in steps))
    export_student(
        tiny_model(),
        make_job(tmp_path, source),
        facts={"epochs": "2"},
        metrics_file=log,
        held_out={"kl": 0.5},
    )
    card = (tmp_path / "model" / "README.md").read_text()
    for name, value in {**CARD, "epochs": "2"}.items():
        assert f"| {name} | {value} |\n" in card
    assert "| last step | loss | 1.25 |\n| held out | kl | 0.5 |\n" in card
    total = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert f"| trained weights | all {total:,} |" in card


@pytest.mark.parametrize("base_model", [None, "owner/model"])
def test_the_header_of_a_card_is_yaml_that_leaves_the_licence_open(base_model: str | None) -> None:
    header = render_model_card(CARD, {}, base_model=base_model).split("---\n")[1]
    found = yaml.safe_load(header)
    assert found["library_name"] == "transformers"
    assert found["license"] == "other"
    assert found.get("base_model") == base_model


def test_text_cannot_break_the_table_of_a_card() -> None:
    card = render_model_card({"student": "a|b", "command": "one\ntwo"}, {})
    assert "| student | a\\|b |\n" in card
    assert "| command | one two |\n" in card
    assert "Metrics" not in card
