"""The trained student as a plain Hugging Face directory."""

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from transformers import AutoTokenizer, GenerationConfig

from storage.files import published_directory


def export_student(
    language_model: Any, *, source: Path, output: Path, card: Mapping[str, str]
) -> None:
    """Write weights, config, tokenizer, chat template, generation config and model card.

    The directory appears whole or not at all, and loads with
    ``AutoModelForCausalLM.from_pretrained`` and with vLLM.

    Args:
        language_model: The trained model; its weights are saved in bfloat16.
        source: Directory of the untrained student: tokenizer and template are taken from it.
        output: Directory to publish.
        card: Facts for the model card, in the order in which they are shown.
    """
    tied = language_model.config.tie_word_embeddings
    head = "lm_head.weight"
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).clone()
        for name, tensor in language_model.state_dict().items()
        if not (tied and name == head)
    }
    with published_directory(output) as directory:
        language_model.config.use_cache = True
        language_model.save_pretrained(directory, state_dict=weights)
        # after the weights: saving them writes the dtype that the model had in training
        language_model.config.dtype = torch.bfloat16
        language_model.config.save_pretrained(directory)
        AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(directory)
        if (source / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(source).save_pretrained(directory)
        (directory / "README.md").write_text(render_model_card(card), encoding="utf-8")


def render_model_card(card: Mapping[str, str]) -> str:
    """The model card as Markdown with a YAML header."""
    text = importlib.resources.files("student_train").joinpath("model_card.md.jinja").read_text()
    template = Environment(autoescape=False, keep_trailing_newline=True).from_string(text)  # noqa: S701 - Markdown
    return template.render(card=card)
