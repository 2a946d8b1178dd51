"""What ``training.py`` compares: one student under DeepSpeed, a step per way to train it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from student_train.config import HybridLossConfig, TrainConfig
from student_train.engine import initialize, prepare_process
from student_train.losses.base import FixedWeights
from student_train.losses.fused_linear import fused_linear_loss
from student_train.models.documents import isolate_documents
from student_train.models.head import head_of
from student_train.models.student import Student, model_inputs
from student_train.schedules import StepState
from student_train.streaming.reader import MicroBatch
from student_train.weights.config import StaticWeightConfig

KINDS = ("hybrid", "fused", "plain", "online")
TAID_T = 0.4


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a micro-batch and of the two models."""

    micro_tokens: int
    hidden: int
    layers: int
    teacher_hidden: int
    teacher_layers: int


def _llama(vocab_size: int, hidden: int, layers: int) -> LlamaForCausalLM:
    """A random Llama with heads of 64 and tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class _Losses(nn.Module):
    """A student with a loss per kind, so that all share one engine and its optimiser."""

    def __init__(self, student: Student, teacher: Any, vocab_size: int) -> None:
        super().__init__()
        self.student, self._vocab_size = student, vocab_size
        # not a submodule: DeepSpeed must not see it
        self._teacher = [teacher]

    def forward(self, batch: MicroBatch, kind: str) -> Tensor:
        """The sum over label rows."""
        if kind == "hybrid":
            total: Tensor = self.student(batch, StepState(step=0, total_steps=1)).total
            return total
        model = self.student.language_model
        inputs = model_inputs(batch)
        if kind == "plain":
            targets = torch.full((inputs["input_ids"].numel(),), -100)
            targets[batch.rows_M] = batch.labels.hard_M
            targets = targets.view(inputs["input_ids"].shape)
            loss: Tensor = model(**inputs, labels=targets, shift_labels=targets).loss
            return loss * len(batch.rows_M)
        hidden_BTH = model.base_model(**inputs).last_hidden_state
        hidden_MH = hidden_BTH.flatten(0, 1).index_select(0, batch.rows_M)
        if kind == "fused":
            ones_M = torch.ones(len(batch.rows_M))
            return fused_linear_loss(
                hidden_MH,
                head_of(model),
                batch.labels,
                divergence=None,
                weights=FixedWeights(0 * ones_M, ones_M),
                vocab_size=self._vocab_size,
            ).total
        with torch.no_grad():
            found = self._teacher[0].base_model(**inputs).last_hidden_state
            found = found.flatten(0, 1).index_select(0, batch.rows_M)
            teacher_MV = self._teacher[0].lm_head(found)
        return _dense_taid(model.lm_head(hidden_MH), teacher_MV)


def _dense_taid(student_MV: Tensor, teacher_MV: Tensor) -> Tensor:
    """As the authors of TAID: softmax and product over the vocabulary in float32."""
    mixture = (1 - TAID_T) * student_MV.detach() + TAID_T * teacher_MV
    target = functional.softmax(mixture, dim=-1, dtype=torch.float32)
    logprobs = functional.log_softmax(student_MV, dim=-1, dtype=torch.float32)
    return -torch.masked_fill(target * logprobs, torch.isinf(student_MV), 0).sum()


class Contenders:
    """A student, and a teacher for those who run one.

    Args:
        sizes: Of the models.
        vocab_size: Of both.
        online: Whether a teacher is made.
    """

    def __init__(self, sizes: Sizes, vocab_size: int, *, online: bool) -> None:
        torch.manual_seed(0)
        self.sizes = sizes
        model = _llama(vocab_size, sizes.hidden, sizes.layers)
        teacher = None
        if online:
            teacher = _llama(vocab_size, sizes.teacher_hidden, sizes.teacher_layers)
            teacher = teacher.to(torch.bfloat16).eval()
            self.teacher_ratio = _num_parameters(teacher) / _num_parameters(model)
            isolate_documents(teacher)
        loss = HybridLossConfig(weight=StaticWeightConfig(soft_weight=0.9))
        student = Student(model, loss, vocab_size)
        isolate_documents(model)
        self._losses = _Losses(student.train(), teacher, vocab_size)
        self._engine: Any = None

    def start(self) -> None:
        """Put the student under DeepSpeed."""
        prepare_process(1)
        self._engine = initialize(self._losses, TrainConfig(model=""))

    def step(self, batch: MicroBatch, kind: str, *, update: bool = True) -> None:
        """Forward, backward and an update, of a micro-batch.

        Args:
            batch: The micro-batch.
            kind: One of ``KINDS``.
            update: Whether the optimiser makes a step.
        """
        self._engine.set_gradient_accumulation_boundary(update)
        total = self._engine(batch, kind)
        self._engine.backward(total / len(batch.rows_M))
        self._engine.step()
