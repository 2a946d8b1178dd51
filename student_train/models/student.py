"""The student as a module: loading, pruning, and the forward pass that ends in a loss."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from storage.errors import ConfigError
from storage.files import published_directory
from student_train.config import SupervisionConfig, TrainConfig
from student_train.errors import PreflightError
from student_train.losses import LOSSES
from student_train.losses.base import LossTerms, load
from student_train.losses.measures import held_out_terms
from student_train.models.documents import document_inputs, isolate_documents
from student_train.models.gather import whole
from student_train.models.head import HeadScope, check_head, head_of
from student_train.models.tokenizer_files import copy_tokenizer, generation_config
from student_train.schedules import StepState
from student_train.streaming.reader import MicroBatch

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_causal_lm(directory: str, dtype: str) -> Any:
    """Load a causal language model from a local directory, safetensors only, no foreign code."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=TORCH_DTYPES[dtype], local_files_only=True, use_safetensors=True
    )


def make_student(directory: str, train: TrainConfig, vocab_size: int) -> "Student":
    """The student of a training, before DeepSpeed takes it over.

    Its weights are float32 in every case: DeepSpeed makes the bfloat16 copy and keeps the masters.

    Raises:
        PreflightError: if the model cannot be trained with these settings.
    """
    language_model = load_causal_lm(directory, "float32")
    if train.lora is not None:
        from student_train.models.lora import add_adapters  # peft takes seconds to import

        add_adapters(language_model, train.lora)
    student = Student(language_model, train.loss, vocab_size, dropout=train.dropout)
    if train.batch.packing != "padded":
        with whole(language_model.parameters()):
            isolate_documents(language_model)
    if train.activation_checkpointing:
        checkpoint_activations(language_model)
    return student.train()


class Student(nn.Module):
    """A causal language model whose forward pass returns the loss of a micro-batch.

    Hidden states of the supervised positions go straight into the fused loss; the full logits
    never exist.

    Args:
        language_model: Any causal model of transformers with a linear output embedding.
        loss: The objective.
        vocab_size: Effective vocabulary of the labels.
        dropout: Whether the model's own dropout is on in training mode. That of adapters is.

    Raises:
        PreflightError: if the model's logits are not those of a :class:`LinearHead`, or its
            vocabulary is too small.
    """

    def __init__(
        self,
        language_model: Any,
        loss: SupervisionConfig,
        vocab_size: int,
        *,
        dropout: bool = False,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self._loss = loss
        self._vocab_size = vocab_size
        self._dropout = dropout
        with whole(language_model.parameters()):
            check_head(language_model)
            num_tokens = head_of(language_model).weight_VH.shape[0]
        if num_tokens < vocab_size:
            raise PreflightError(
                f"the student's vocabulary has {num_tokens} rows, the labels use "
                f"{vocab_size}; choose a student with the teacher's tokenizer"
            )
        self._head_scope = HeadScope(language_model.get_output_embeddings())

    def train(self, mode: bool = True) -> Self:
        """Switch training mode on or off; without dropout the model stays as it is used later."""
        super().train(mode)
        if not self._dropout:
            self.language_model.eval()
            for module in self.language_model.modules():
                if hasattr(module, "lora_dropout"):
                    module.lora_dropout.train(mode)
        return self

    def forward(self, batch: MicroBatch, step: StepState, *, measure: bool = False) -> LossTerms:
        """Loss of a micro-batch, summed over its supervised positions.

        Args:
            batch: The micro-batch; a packed one needs a model that was set up for it
                (:func:`student_train.models.documents.isolate_documents`).
            step: Where the training stands; evaluation, whose loss does not move, gives any.
            measure: Whether to take :func:`student_train.losses.measures.held_out_terms` instead
                of the objective.
        """
        hidden_BTH = self.language_model.base_model(**model_inputs(batch)).last_hidden_state
        hidden_MH = hidden_BTH.flatten(0, 1).index_select(0, batch.rows_M)
        compute = held_out_terms if measure else self._objective(step)
        found: list[LossTerms] = []

        def total(hidden_MH: Tensor) -> Tensor:
            head = head_of(self.language_model)
            terms = compute(hidden_MH, head, batch.labels, vocab_size=self._vocab_size)
            found.append(terms)
            return terms.total

        total_in_scope = self._head_scope(hidden_MH, total)
        return found[0]._replace(total=total_in_scope)

    def _objective(self, step: StepState) -> Callable[..., LossTerms]:
        """The loss of a step, as a function of hidden states, head and labels."""
        loss = cast(Callable[..., LossTerms], load(LOSSES[self._loss.type]))
        return partial(loss, config=self._loss, step=step)


def model_inputs(batch: MicroBatch) -> dict[str, Any]:
    """What a base model is called with."""
    if batch.document_ends is not None:
        return document_inputs(batch.input_ids_BT, batch.document_ends)
    return {
        "input_ids": batch.input_ids_BT,
        "attention_mask": batch.attention_mask_BT,
        "use_cache": False,
    }


def checkpoint_activations(language_model: Any) -> None:
    """Keep only the inputs of decoder layers for the backward pass, and compute the rest again.

    The switch that transformers has for it works only in training mode, which is where a model has
    its dropout. The layers are those that it would take.

    Raises:
        PreflightError: if the model has no such layers.
    """
    layers = [m for m in language_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise PreflightError(
            f"{type(language_model).__name__} has no layers whose activations can be computed "
            "again; set train.activation_checkpointing: false"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def prune_layers(source: Path, keep: Sequence[int], output: Path) -> None:
    """Write a copy of a model that keeps some decoder layers, renumbered from 0.

    Embeddings, final norm, head, tokenizer and chat template are copied unchanged. The directory
    appears whole or not at all.

    Raises:
        ConfigError: if a layer does not exist or the model has no ``model.layers``.
    """
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=AutoConfig.from_pretrained(source).dtype,
        local_files_only=True,
        use_safetensors=True,
    )
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"{str(source)!r} has no list of decoder layers to prune")
    wrong = [index for index in keep if not 0 <= index < len(layers)]
    if wrong:
        raise ConfigError(f"keep_layers {wrong} do not exist: the model has {len(layers)} layers")
    model.base_model.layers = nn.ModuleList([layers[index] for index in keep])
    for index, layer in enumerate(model.base_model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    model.config.num_hidden_layers = len(keep)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in keep]
    with published_directory(output) as directory:
        model.generation_config = generation_config(source)
        model.save_pretrained(directory)
        copy_tokenizer(source, directory)
