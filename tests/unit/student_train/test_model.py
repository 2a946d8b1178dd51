"""The student as a module: its loss is that of its own logits, and pruning keeps what it says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from storage.errors import ConfigError
from storage.samples import LabelledSample
from storage.testing import make_spec
from student_train.config import HybridLossConfig
from student_train.errors import PreflightError
from student_train.losses.reference import reference_loss
from student_train.models.student import Student, load_causal_lm, prune_layers
from student_train.schedules import StepState
from student_train.streaming.reader import collate
from student_train.weights.config import StaticWeightConfig

VOCAB_SIZE = 40
MakeModel = Callable[..., LlamaForCausalLM]
SaveStudent = Callable[..., Path]
SPEC = make_spec(vocab_size=VOCAB_SIZE)
NOW = StepState(step=0, total_steps=1)
LOSS = HybridLossConfig(weight=StaticWeightConfig(soft_weight=0.25))


# -- the loss -------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_the_reference_on_the_models_own_logits(
    tiny_model: MakeModel, samples: list[LabelledSample], tied: bool
) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    batch = collate(samples, "sampled", SPEC)
    terms = Student(model, LOSS, VOCAB_SIZE)(batch, NOW)
    found = torch.autograd.grad(terms.total, list(model.parameters()))
    logits_MV = model(
        input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT
    ).logits.flatten(0, 1)[batch.rows_M, :VOCAB_SIZE]
    expected = reference_loss(
        logits_MV,
        batch.labels,
        divergence="forward_kl",
        soft_weight_M=torch.full((len(batch.labels),), 0.25),
        hard_weight_M=torch.full((len(batch.labels),), 0.75),
    )
    torch.testing.assert_close(terms.total, expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_padding_a_sample_changes_none_of_its_terms(
    tiny_model: MakeModel, samples: list[LabelledSample]
) -> None:
    student = Student(tiny_model(), LOSS, VOCAB_SIZE)
    together = student(collate(samples, "sampled", SPEC), NOW)
    alone = [student(collate([sample], "sampled", SPEC), NOW) for sample in samples]
    soft_M = torch.cat([terms.soft_M for terms in alone])
    torch.testing.assert_close(together.soft_M, soft_M, rtol=1e-4, atol=1e-5)
    total = torch.stack([terms.total for terms in alone]).sum()
    torch.testing.assert_close(together.total, total, rtol=1e-5, atol=0)


def test_a_vocabulary_smaller_than_that_of_the_labels_is_refused(tiny_model: MakeModel) -> None:
    with pytest.raises(PreflightError, match="vocabulary has 39 rows, the labels use 40"):
        Student(tiny_model(vocab_size=39), LOSS, VOCAB_SIZE)


class Doubled(LlamaForCausalLM):
    """Its logits are not those of its output embedding, and no config says so."""

    def forward(self, *args: object, **options: object) -> object:
        output = super().forward(*args, **options)
        output.logits = 2 * output.logits
        return output


def test_logits_that_are_not_those_of_the_output_embedding_are_refused(
    tiny_model: MakeModel,
) -> None:
    """The loss would be computed on other logits than the model has at inference."""
    model = tiny_model()
    other = Doubled(model.config)
    other.load_state_dict(model.state_dict())
    with pytest.raises(PreflightError, match="transforms its logits in a way that is not"):
        Student(other, LOSS, VOCAB_SIZE)


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_a_setting_that_the_model_does_not_follow_is_refused(
    tiny_model: MakeModel, name: str
) -> None:
    """A Llama whose config asks for a transform has the plain logits all the same."""
    model = tiny_model()
    setattr(model.config, name, 0.5)
    with pytest.raises(PreflightError, match="transforms its logits in a way that is not"):
        Student(model, LOSS, VOCAB_SIZE)


# -- loading and pruning --------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_loads_in_the_dtype_that_was_asked_for(
    tmp_path: Path, save_student: SaveStudent, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    model = load_causal_lm(str(save_student(tmp_path / "m")), name)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_pickled_weights_are_not_loaded(tmp_path: Path, save_student: SaveStudent) -> None:
    directory = save_student(tmp_path / "m")
    weights = directory / "model.safetensors"
    torch.save({}, directory / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_causal_lm(str(directory), "float32")


def test_pruning_keeps_the_layers_in_the_given_order_and_renumbers_them(
    tmp_path: Path, save_student: SaveStudent
) -> None:
    source = save_student(tmp_path / "parent")
    prune_layers(source, (2, 0), tmp_path / "pruned")
    parent = AutoModelForCausalLM.from_pretrained(source)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert pruned.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1]
    for place, kept in enumerate((2, 0)):
        wanted = parent.model.layers[kept].state_dict()
        for name, tensor in pruned.model.layers[place].state_dict().items():
            assert torch.equal(tensor, wanted[name]), name
    for part in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(pruned.state_dict()[part], parent.state_dict()[part])


def test_a_pruned_model_runs_with_a_cache(tmp_path: Path, save_student: SaveStudent) -> None:
    """A layer that kept its old number would write to a place that the cache does not have."""
    prune_layers(save_student(tmp_path / "parent"), (2,), tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    ids = torch.tensor([[3, 4, 5]])
    answer = pruned.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=1
    )
    assert answer.shape[1] > 3


def test_a_pruned_model_keeps_dtype_tokenizer_and_template(
    tmp_path: Path, save_student: SaveStudent
) -> None:
    source = save_student(tmp_path / "parent", dtype="bfloat16")
    prune_layers(source, (0, 1), tmp_path / "pruned")
    found, wanted = (AutoTokenizer.from_pretrained(d) for d in (tmp_path / "pruned", source))
    assert found.get_vocab() == wanted.get_vocab()
    assert found.chat_template == wanted.chat_template
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert pruned.dtype == AutoModelForCausalLM.from_pretrained(source).dtype


@pytest.mark.parametrize("keep", [(0, 3), (-1,)])
def test_a_layer_that_does_not_exist_is_refused(
    tmp_path: Path, save_student: SaveStudent, keep: tuple[int, ...]
) -> None:
    source = save_student(tmp_path / "parent")
    with pytest.raises(ConfigError, match=rf"\[{keep[-1]}\] do not exist: the model has 3 layers"):
        prune_layers(source, keep, tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]
