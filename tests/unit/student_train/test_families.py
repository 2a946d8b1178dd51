"""Loss and gradient of every family are those of its own logits, however it is trained."""

from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from storage.samples import LabelledSample
from storage.testing import make_spec
from student_train.config import HybridLossConfig
from student_train.errors import PreflightError
from student_train.losses.reference import reference_loss
from student_train.models.documents import isolate_documents
from student_train.models.lora import add_adapters
from student_train.models.lora_config import LoraConfig
from student_train.models.student import Student, checkpoint_activations
from student_train.schedules import StepState
from student_train.streaming.reader import MicroBatch, collate
from tests.unit.student_train.language_models import (
    FAMILIES,
    PACKABLE,
    VOCAB_SIZE,
    make_model,
)

SPEC = make_spec(vocab_size=VOCAB_SIZE)
LOSS = HybridLossConfig()
NOW = StepState(step=0, total_steps=1)
LORA = LoraConfig(r=2, alpha=4)
CASES = [(name, False) for name in FAMILIES] + [(name, True) for name in PACKABLE]
"""Each padded, and packed where it can be."""


def make_student(model: Any, *, packed: bool, **options: bool) -> Student:
    """As a training makes it, up to training mode."""
    student = Student(model, LOSS, VOCAB_SIZE, **options)
    if packed:
        isolate_documents(model)
    return student.train()


def gradients_of(total: Tensor, model: Any) -> dict[str, Tensor]:
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(learning, torch.autograd.grad(total, list(learning.values())), strict=True))


def reference_of(model: Any, samples: list[LabelledSample]) -> Tensor:
    """The loss written down from ``model(...).logits`` of every sample by itself."""
    totals = []
    for sample in samples:
        batch = collate([sample], "sampled", SPEC)
        logits_MV = model(input_ids=batch.input_ids_BT).logits[0, batch.rows_M, :VOCAB_SIZE]
        half_M = torch.full((len(batch.labels),), 0.5)
        totals.append(
            reference_loss(
                logits_MV,
                batch.labels,
                divergence="forward_kl",
                soft_weight_M=half_M,
                hard_weight_M=half_M,
            )
        )
    return torch.stack(totals).sum()


def randomize_adapters(model: Any) -> None:
    """An adapter begins as zero; one that has learnt is not."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)


@pytest.mark.parametrize("trained", ["all", "lora"])
@pytest.mark.parametrize(("family", "packed"), CASES)
def test_loss_and_gradient_are_those_of_the_models_own_logits(
    family: str, packed: bool, trained: str, samples: list[LabelledSample]
) -> None:
    model = make_model(FAMILIES[family])
    if trained == "lora":
        add_adapters(model, LORA)
        randomize_adapters(model)
    expected = reference_of(model, samples)
    wanted = gradients_of(expected, model)
    found = make_student(model, packed=packed)(
        collate(samples, "sampled", SPEC, packed=packed), NOW
    ).total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for name, gradient in gradients_of(found, model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


# -- activation checkpointing ---------------------------------------------------------------------
@pytest.mark.parametrize("trained", ["all", "lora"])
@pytest.mark.parametrize("family", PACKABLE)
def test_activations_computed_again_change_no_bit(
    family: str, trained: str, samples: list[LabelledSample]
) -> None:
    """The boundaries of documents reach the second forward pass; gradients reach the first layer,
    although the embeddings below it learn nothing with adapters."""
    batch = collate(samples, "sampled", SPEC, packed=True)

    def run(again: bool, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        model = make_model(FAMILIES[family])
        if trained == "lora":
            with torch.random.fork_rng():
                torch.manual_seed(0)
                add_adapters(model, LORA)
            randomize_adapters(model)
        student = make_student(model.to(dtype), packed=True)
        if again:
            checkpoint_activations(model)
        total = student(batch, NOW).total
        return total, gradients_of(total, model)

    for dtype in (torch.float32, torch.bfloat16):
        expected, wanted = run(False, dtype)
        found, gradients = run(True, dtype)
        assert torch.equal(found, expected)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, wanted[name]), name


def test_activations_are_really_not_kept(samples: list[LabelledSample]) -> None:
    """Elements that autograd holds between the passes, without and with."""
    held = []
    for again in (False, True):
        model = make_model(FAMILIES["llama"])
        student = make_student(model, packed=False)
        if again:
            checkpoint_activations(model)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            student(collate(samples, "sampled", SPEC), NOW)
        held.append(sum(sizes))
    assert held[1] < held[0] / 2


# -- dropout --------------------------------------------------------------------------------------
def losses_twice(student: Student, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    first, second = student(batch, NOW).total, student(batch, NOW).total
    return first.detach(), second.detach()


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_models_own_dropout_is_off_unless_asked_for(
    family: str, samples: list[LabelledSample]
) -> None:
    batch = collate(samples, "sampled", SPEC)
    quiet = make_student(make_model(FAMILIES[family]), packed=False)
    with torch.random.fork_rng():
        first, second = losses_twice(quiet, batch)
        assert torch.equal(first, second)
        noisy = make_student(make_model(FAMILIES[family]), packed=False, dropout=True)
        first, second = losses_twice(noisy, batch)
        assert not torch.equal(first, second)
        first, second = losses_twice(noisy.eval(), batch)
        assert torch.equal(first, second)


def test_dropout_of_adapters_is_on_in_training_alone(samples: list[LabelledSample]) -> None:
    batch = collate(samples, "sampled", SPEC)
    model = make_model(FAMILIES["gpt2"])
    add_adapters(model, LoraConfig(r=2, dropout=0.5))
    randomize_adapters(model)
    with torch.random.fork_rng():
        student = make_student(model, packed=True)
        first, second = losses_twice(student, batch)
        assert not torch.equal(first, second)
        first, second = losses_twice(student.eval(), batch)
        assert torch.equal(first, second)


# -- adapters -------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_at_every_linear_layer_but_the_head(family: str) -> None:
    model = make_model(FAMILIES[family])
    head = model.get_output_embeddings()
    before = model(torch.tensor([[3, 4, 5]])).logits
    linear = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in {"Linear", "Conv1D", "FalconLinear"} and module is not head
    ]
    add_adapters(model, LORA)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert adapted == linear
    assert len(adapted) >= 8
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    assert torch.equal(model(torch.tensor([[3, 4, 5]])).logits, before)


def test_named_layers_alone_get_adapters() -> None:
    model = make_model(FAMILIES["llama"])
    add_adapters(model, LoraConfig(target_modules=("q_proj", "layers.1.mlp.down_proj")))
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert adapted == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(PreflightError, match=r"names 'c_attn', which is no .*; it has .*q_proj"):
        add_adapters(make_model(FAMILIES["llama"]), LoraConfig(target_modules=("q_proj", "c_attn")))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_embedding_at_both_ends_gets_no_adapter(name: str) -> None:
    with pytest.raises(PreflightError, match="one weight at both ends"):
        add_adapters(make_model(FAMILIES["qwen2"]), LoraConfig(target_modules=(name,)))


def test_a_head_of_its_own_can_have_an_adapter(samples: list[LabelledSample]) -> None:
    model = make_model(FAMILIES["llama"])
    add_adapters(model, LoraConfig(r=2, target_modules=("lm_head", "q_proj")))
    randomize_adapters(model)
    expected = reference_of(model, samples)
    found = make_student(model, packed=False)(collate(samples, "sampled", SPEC), NOW).total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    wanted = gradients_of(expected, model)
    for name, gradient in gradients_of(found, model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4)
