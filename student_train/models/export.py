"""The trained student as a plain Hugging Face directory, and its adapter as peft's."""

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from storage.files import published_directory
from student_train.config import ADAPTER_DIRECTORY, MODEL_DIRECTORY, TrainJob
from student_train.models.gather import gather_weights, num_elements
from student_train.models.student import TORCH_DTYPES, load_causal_lm
from student_train.models.tokenizer_files import copy_tokenizer, generation_config

MAX_SHARD_SIZE = "5GB"
"""Larger models are written in several files, as on the hubs."""

STEP_METRICS = ("loss", "soft", "hard", "agreement")
"""What the model card shows of the last step."""


def export_student(
    language_model: Any,
    job: TrainJob,
    *,
    optimizer: Any = None,
    facts: Mapping[str, str],
    metrics_file: Path | None = None,
    held_out: Mapping[str, float] | None = None,
    write: bool = True,
) -> None:
    """Write ``<output>/model`` and, where only an adapter was trained, ``<output>/adapter``.

    A directory appears whole or not at all. The model loads with
    ``AutoModelForCausalLM.from_pretrained`` and with vLLM; the weights of an adapter are merged
    into it. The adapter loads with ``PeftModel.from_pretrained(untrained, adapter)``.

    Call it on every rank.

    Args:
        language_model: The trained model, at any ZeRO stage.
        job: The training.
        optimizer: That of the DeepSpeed engine.
        facts: For the model card, behind those of the job, in the order in which they are shown.
        metrics_file: ``metrics.jsonl`` of the training; the model card shows its last step.
        held_out: Metrics on held-out labels, for the model card.
        write: Whether this rank writes; the others only take part in gathering weights.
    """
    only_adapter = job.train.lora is not None
    dtype = TORCH_DTYPES["float32" if only_adapter else job.train.export_dtype]
    weights = gather_weights(
        language_model, optimizer, dtype=dtype, keep=write, only_trained=only_adapter
    )
    if not write:
        return
    output = Path(job.output)
    facts = {**job.card, "trained weights": _what_is_trained(language_model, job), **facts}
    metrics = {"last step": _last_step(metrics_file), "held out": dict(held_out or {})}
    if only_adapter:
        weights = _export_adapter(language_model, weights, job, facts, metrics)
    with published_directory(output / MODEL_DIRECTORY) as directory:
        _write_model(directory, weights, language_model, job)
        card = render_model_card(facts, metrics, base_model=_hub_name(job))
        (directory / "README.md").write_text(card, encoding="utf-8")


def _export_adapter(
    language_model: Any,
    weights: dict[str, Tensor],
    job: TrainJob,
    facts: Mapping[str, str],
    metrics: Mapping[str, Mapping[str, float]],
) -> dict[str, Tensor]:
    """Write the adapter; returns the weights of the whole model with it."""
    from student_train.models.lora import (  # peft takes seconds to import
        merged_weights,
        save_adapter,
    )

    output = Path(job.output) / ADAPTER_DIRECTORY
    with published_directory(output) as directory:
        save_adapter(language_model, weights, directory, base=_hub_name(job) or job.model)
        card = render_model_card(facts, metrics, base_model=_hub_name(job), library="peft")
        (directory / "README.md").write_text(card, encoding="utf-8")
    base = load_causal_lm(job.model, "float32")
    return merged_weights(base, output, TORCH_DTYPES[job.train.export_dtype])


def _write_model(
    directory: Path, weights: dict[str, Tensor], language_model: Any, job: TrainJob
) -> None:
    """Weights, config, tokenizer and generation settings.

    A model without weights does the saving, whose config is that of the untrained student: that of
    the trained one tells what training did to it.
    """
    source = Path(job.model)
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[job.train.export_dtype])
    # which names the weights had in the file they were loaded from
    model._weight_conversions = getattr(language_model, "_weight_conversions", None)
    like_teacher = job.train.chat_template == "teacher"
    teacher = Path(job.tokenizer) if like_teacher else None
    model.generation_config = generation_config(source, ends_like=teacher)
    model.save_pretrained(directory, state_dict=weights, max_shard_size=MAX_SHARD_SIZE)
    copy_tokenizer(teacher or source, directory)


def _what_is_trained(language_model: Any, job: TrainJob) -> str:
    parameters = list(language_model.parameters())
    trained = sum(num_elements(p) for p in parameters if p.requires_grad)
    total = sum(map(num_elements, parameters))
    if job.train.lora is None:
        return f"all {total:,}"
    return f"{trained:,} of LoRA beside {total - trained:,}; {job.train.lora.model_dump_json()}"


def _hub_name(job: TrainJob) -> str | None:
    """The untrained student's name on a hub; None where it is a directory."""
    model = job.train.model
    if isinstance(model, str) and model.count("/") == 1 and not Path(model).is_dir():
        return model
    return None


def _last_step(file: Path | None) -> dict[str, float]:
    """What the last step of a training was measured to be; empty where nothing was."""
    lines = file.read_text().splitlines() if file is not None and file.is_file() else []
    metrics = json.loads(lines[-1]) if lines else {}
    return {name: metrics[name] for name in STEP_METRICS if name in metrics}


def render_model_card(
    facts: Mapping[str, str],
    metrics: Mapping[str, Mapping[str, float]],
    *,
    base_model: str | None = None,
    library: str = "transformers",
) -> str:
    """The model card as Markdown with a YAML header.

    Args:
        facts: Shown in a table, in this order.
        metrics: Values by name, by what they were measured on; nothing is shown of an empty one.
        base_model: Name of the untrained student on a hub.
        library: What loads the directory: ``transformers`` or ``peft``.
    """
    text = (
        importlib.resources.files("student_train.models")
        .joinpath("model_card.md.jinja")
        .read_text()
    )
    environment = Environment(
        autoescape=False,  # noqa: S701 - Markdown
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(text).render(
        card=facts, metrics=metrics, base_model=base_model, library=library
    )
