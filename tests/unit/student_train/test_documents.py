"""Documents of a packed row are exactly what each would be alone, whatever the architecture."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from transformers import LlamaForCausalLM, PretrainedConfig

from storage.samples import LabelledSample
from storage.testing import make_spec
from student_train.config import HybridLossConfig
from student_train.errors import PreflightError
from student_train.models.documents import document_inputs, isolate_documents, packing_error
from student_train.models.student import Student
from student_train.schedules import StepState
from student_train.streaming.reader import collate
from tests.unit.student_train.language_models import PACKABLE, PADDED_ONLY, make_model

FP32 = 1e-5
"""Relative to the largest logit: documents are computed by the same kernels on other shapes."""

DOCUMENTS = ([5, 6, 7, 8, 9, 10, 11], [12], [7, 30, 2], [5, 6, 7, 8, 9, 10, 11, 12, 13])
"""One that another begins with, and one of a single token."""


def logits_alone(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat(
        [
            model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0]
            for ids in DOCUMENTS
        ]
    )


def packed_inputs() -> dict[str, object]:
    ids = [token for document in DOCUMENTS for token in document]
    ends = torch.tensor([len(document) for document in DOCUMENTS]).cumsum(0).tolist()
    return document_inputs(torch.tensor([ids]), tuple(ends))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


CASES = [(name, "sdpa") for name in PACKABLE]
# the masks of OPT know nothing of documents, see below what is refused
CASES += [(name, "eager") for name in PACKABLE if name != "opt"]


@pytest.mark.parametrize(("name", "attention"), CASES)
@torch.no_grad()
def test_packed_logits_are_those_of_single_documents(name: str, attention: str) -> None:
    model = make_model(PACKABLE[name], attn_implementation=attention)
    expected = logits_alone(model)
    found = isolate_documents(model)
    assert found == ("per_document" if attention == "sdpa" else "masked")
    assert difference(model(**packed_inputs()).logits[0], expected) < FP32


@torch.no_grad()
def test_what_packs_without_isolation_is_seen() -> None:
    """Documents that do see each other are told from rounding, in the probe and in the test."""
    model = make_model(PACKABLE["llama"])
    expected = logits_alone(model)
    ids = packed_inputs()["input_ids"]
    assert isinstance(ids, torch.Tensor)
    contaminated = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    assert difference(contaminated, expected) > 100 * FP32
    restarting = {"input_ids": ids, "position_ids": packed_inputs()["position_ids"]}
    # what transformers does by default: it makes a cache, and looks for no documents then
    cached = model(**restarting).logits[0]
    assert difference(cached, expected) > 100 * FP32


@pytest.mark.parametrize("config", [*PADDED_ONLY.values(), PACKABLE["opt"]])
def test_a_model_that_cannot_keep_documents_apart_is_refused(config: PretrainedConfig) -> None:
    model = make_model(config, attn_implementation="eager")
    assert packing_error(model) > 1e-3
    with pytest.raises(PreflightError, match=r"see each other .*set train.batch.packing: padded"):
        isolate_documents(model)


def test_a_refused_model_keeps_its_attention() -> None:
    model = make_model(PADDED_ONLY["bloom"])
    before = model.config._attn_implementation
    with pytest.raises(PreflightError):
        isolate_documents(model)
    assert model.config._attn_implementation == before


@torch.no_grad()
def test_changing_one_document_changes_no_other(
    tiny_model: Callable[..., LlamaForCausalLM],
) -> None:
    """The sharpest form: not a bit of the others moves."""
    model = tiny_model()
    isolate_documents(model)
    before = model(**packed_inputs()).logits[0]
    inputs = packed_inputs()
    ids = inputs["input_ids"]
    assert isinstance(ids, torch.Tensor)
    ids[0, :7] = 33  # all of the first document
    after = model(**inputs).logits[0]
    assert not torch.equal(before[:7], after[:7])
    assert torch.equal(before[7:], after[7:])


# -- the loss -------------------------------------------------------------------------------------
LOSSES = {
    "hybrid": HybridLossConfig(),
    "risk_guided": HybridLossConfig.model_validate({"hard_term": "risk_guided"}),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradient_of_a_packed_batch_are_those_of_single_samples(
    loss: str, tiny_model: Callable[..., LlamaForCausalLM], samples: list[LabelledSample]
) -> None:
    """Neither attention, nor the shift to the next token, nor discounting crosses a boundary."""
    spec, now = make_spec(vocab_size=40), StepState(step=0, total_steps=1)
    model = tiny_model()
    student = Student(model, LOSSES[loss], 40)
    parameters = list(model.parameters())
    alone = [student(collate([sample], "sampled", spec), now) for sample in samples]
    expected = torch.stack([terms.total for terms in alone]).sum()
    expected_gradients = torch.autograd.grad(expected, parameters)
    isolate_documents(model)
    found = student(collate(samples, "sampled", spec, packed=True), now)
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=0)
    soft_M = torch.cat([terms.soft_M for terms in alone])
    torch.testing.assert_close(found.soft_M, soft_M, rtol=1e-4, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found.total, parameters), expected_gradients, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_rows_of_a_packed_batch_stay_within_their_sample(samples: list[LabelledSample]) -> None:
    spec = make_spec(vocab_size=40)
    batch = collate(samples, "sampled", spec, packed=True)
    assert batch.document_ends is not None
    assert batch.labels.document_M is not None
    bounds = list(pairwise((0, *batch.document_ends)))
    for row, document in zip(batch.rows_M.tolist(), batch.labels.document_M.tolist(), strict=True):
        assert bounds[document][0] <= row < bounds[document][1]
    assert batch.attention_mask_BT.all()  # nothing is padding
