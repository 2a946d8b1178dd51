"""What turns hidden states into logits, read off a model and checked against it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
)

from storage.samples import LabelledSample
from storage.testing import make_spec
from student_train.config import HybridLossConfig
from student_train.errors import PreflightError
from student_train.losses.reference import reference_loss
from student_train.models.head import HeadScope, check_head, head_of
from student_train.models.student import Student
from student_train.schedules import StepState
from student_train.streaming.reader import collate

VOCAB_SIZE = 40
MakeModel = Callable[..., LlamaForCausalLM]
SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
TRANSFORMING = pytest.mark.parametrize(
    ("config", "model", "options"),
    [
        # logits of a random model are about 0.1: the cap has to be small to matter
        (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 0.05}),
        (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
        (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}),
    ],
    ids=["gemma2", "cohere", "granite"],
)


class LowRankLinear(nn.Module):
    """A linear map with adapters, laid out as peft does."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        width, out = base.in_features, base.out_features
        self.base_layer = base
        names = ("one", "two", "off")
        self.lora_A = nn.ModuleDict({n: nn.Linear(width, rank, bias=False) for n in names})
        self.lora_B = nn.ModuleDict({n: nn.Linear(rank, out, bias=False) for n in names})
        self.scaling = {"one": 0.5, "two": 2.0, "off": 1.0}
        self.active_adapters = ["one", "two"]
        self.merged = self.disable_adapters = False

    @property
    def weight(self) -> Tensor:
        """That of the base, which is not the whole truth."""
        return self.base_layer.weight

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.base_layer(hidden)
        for name in self.active_adapters:
            out = out + self.scaling[name] * self.lora_B[name](self.lora_A[name](hidden))
        return out


def assert_the_loss_is_that_of_the_logits(model: Any, samples: list[LabelledSample]) -> None:
    """Value and gradient of a student's loss are those of the model's own logits."""
    batch = collate(samples, "sampled", make_spec(vocab_size=VOCAB_SIZE))
    student = Student(model, HybridLossConfig(), VOCAB_SIZE)
    terms = student(batch, StepState(step=0, total_steps=1))
    logits_MV = model(
        input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT
    ).logits.flatten(0, 1)[batch.rows_M, :VOCAB_SIZE]
    half_M = torch.full((len(batch.labels),), 0.5)
    expected = reference_loss(
        logits_MV,
        batch.labels,
        divergence="forward_kl",
        soft_weight_M=half_M,
        hard_weight_M=half_M,
    )
    torch.testing.assert_close(terms.total, expected, rtol=1e-5, atol=0)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # an adapter that is switched off has no gradient
    found = torch.autograd.grad(terms.total, learning, allow_unused=True)
    wanted = torch.autograd.grad(expected, learning, allow_unused=True)
    assert sum(gradient is not None for gradient in found) >= 3
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_plain_head_is_its_weight(tiny_model: MakeModel) -> None:
    model = tiny_model()
    head = head_of(model)
    assert head.weight_VH is model.lm_head.weight
    assert (head.bias_V, head.softcap, head.scale) == (None, None, 1.0)
    check_head(model)


@TRANSFORMING
def test_models_that_transform_their_logits_are_understood(
    config: Any, model: Any, options: dict[str, float], samples: list[LabelledSample]
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        language_model = model(config(**SIZES, **options)).eval()
    assert_the_loss_is_that_of_the_logits(language_model, samples)
    check_head(language_model.bfloat16())


def test_a_head_with_a_bias_is_used_with_it(
    tiny_model: MakeModel, samples: list[LabelledSample]
) -> None:
    model = tiny_model(tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.lm_head = nn.Linear(16, 48, bias=True)
    assert head_of(model).bias_V is model.lm_head.bias
    assert_the_loss_is_that_of_the_logits(model, samples)


def test_adapters_of_the_head_are_merged_and_learn(
    tiny_model: MakeModel, samples: list[LabelledSample]
) -> None:
    model = tiny_model(tie_word_embeddings=False).requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.lm_head = LowRankLinear(model.lm_head)
    assert_the_loss_is_that_of_the_logits(model, samples)
    base, one, off = (
        model.lm_head.base_layer.weight,
        model.lm_head.lora_A["one"].weight,
        model.lm_head.lora_A["off"].weight,
    )
    gradients = torch.autograd.grad(head_of(model).weight_VH.sum(), (one, off), allow_unused=True)
    assert not base.requires_grad
    assert gradients[0] is not None
    assert gradients[1] is None


@pytest.mark.parametrize("state", ["merged", "disable_adapters"])
def test_adapters_that_are_merged_or_off_are_not_added(tiny_model: MakeModel, state: str) -> None:
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head = LowRankLinear(model.lm_head)
    setattr(model.lm_head, state, True)
    assert head_of(model).weight_VH is model.lm_head.base_layer.weight


def test_adapters_that_do_more_are_refused(tiny_model: MakeModel) -> None:
    """Each of them may change nothing before the first step, so comparing logits is not enough."""
    for extra, found in {
        "lora_variant": ({"two": object()}, "a variant such as DoRA"),
        "lora_dropout": (nn.ModuleDict({"one": nn.Dropout(0.1)}), "dropout"),
        "lora_B": (nn.ModuleDict({n: nn.Linear(2, 48) for n in ("one", "two")}), "a bias"),
    }.items():
        model = tiny_model(tie_word_embeddings=False)
        model.lm_head = LowRankLinear(model.lm_head)
        setattr(model.lm_head, extra, found[0])
        with pytest.raises(PreflightError, match=f"adapter '(one|two)' .* has {found[1]};"):
            head_of(model)


def test_a_head_without_a_weight_is_refused(tiny_model: MakeModel) -> None:
    model = tiny_model()
    model.lm_head = nn.Identity()
    with pytest.raises(PreflightError, match="its head is Identity"):
        head_of(model)


@pytest.mark.parametrize("training", [True, False])
def test_checking_leaves_the_mode_of_the_model(tiny_model: MakeModel, training: bool) -> None:
    model = tiny_model().train(training)
    check_head(model)
    assert model.training is training


def test_the_scope_shares_the_heads_parameters_and_adds_none(tiny_model: MakeModel) -> None:
    student = Student(tiny_model(tie_word_embeddings=False), HybridLossConfig(), VOCAB_SIZE)
    plain = student.language_model
    assert {id(p) for p in student.parameters()} == {id(p) for p in plain.parameters()}
    assert set(student.state_dict()) == {f"language_model.{name}" for name in plain.state_dict()}
    student.load_state_dict(student.state_dict())
    assert next(iter(HeadScope(plain.lm_head).parameters())) is plain.lm_head.weight
