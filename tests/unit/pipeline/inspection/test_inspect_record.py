"""The numbers of an inspected sample, against the labels and the formulas that they come from."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from pipeline.inspection.measures import MEASURES, measure_named
from pipeline.inspection.record import InspectedSample, bridge_scores, describe, of_labels
from pipeline.inspection.source import Inspector
from pipeline.inspection.testing import TEXTS
from storage.errors import ConfigError, NotLabelledError
from storage.keys import MassSpec
from storage.tail import LOG_ZERO
from storage.testing import make_sample, make_spec

Read = Callable[[str], InspectedSample]


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_of_a_sample_is_the_text_that_was_labelled(inspected: Read, name: str) -> None:
    found = inspected(name).response
    text = "".join(
        p.text if p.joined is None else p.joined for n, p in enumerate(found) if p.first == n
    )
    assert text == TEXTS[name] + "<|end|>"
    assert found[-1].kind == "special"


def test_every_number_is_that_of_the_label(inspected: Read) -> None:
    found = inspected("plain")
    sample, values = found.sample, found.predictions[0].values
    assert sample.entropy_N is not None
    for n in range(len(sample.positions_N)):
        top = math.exp(float(sample.topk_logprobs_NK[n, 0]))
        assert values["entropy"][n] == pytest.approx(float(sample.entropy_N[n]))
        assert values["tail"][n] == pytest.approx(math.exp(float(sample.log_tail_mass_N[n])))
        assert values["surprise"][n] == pytest.approx(-float(sample.token_logprob_N[n]))
        assert values["rank"][n] == sample.token_rank_N[n]
        assert values["bridge"][n] == pytest.approx(min(top, 1.0))
    assert "kl" not in values
    assert not found.disagrees_N.any()


def test_the_bridge_score_is_one_minus_the_published_weight() -> None:
    torch = pytest.importorskip("torch")
    from student_train.streaming.teacher_rows import teacher_rows
    from student_train.weights.base import WeightContext
    from student_train.weights.confidence import confidence_weight
    from student_train.weights.config import ConfidenceWeightConfig

    spec = make_spec()
    sample = make_sample(3, spec)
    rows = teacher_rows([sample], "sampled", spec)
    context = WeightContext(vocab_size=spec.vocab_size, step=None)  # type: ignore[arg-type]
    weights = confidence_weight(rows, ConfidenceWeightConfig(), context)
    expected = 1.0 - weights.soft_M.numpy()
    assert torch.is_tensor(weights.soft_M)
    np.testing.assert_allclose(bridge_scores(sample.topk_logprobs_NK), expected, atol=1e-6)


def test_a_tail_of_nothing_is_zero_and_a_rounded_one_is_one() -> None:
    sample = make_sample(0, make_spec())
    sample.log_tail_mass_N[0] = LOG_ZERO
    sample.topk_logprobs_NK[0, 0] = 1e-4
    values = of_labels(sample, "labels").values
    assert values["tail"][0] == 0.0
    assert values["bridge"][0] == 1.0


def test_a_label_set_without_entropy_says_so(inspected: Read) -> None:
    sample = make_sample(0, make_spec(columns=()))
    found = of_labels(sample, "labels")
    assert "entropy" not in found.values
    with pytest.raises(ConfigError, match=r"labels has no entropy.*known are tail"):
        found.require("entropy")
    with pytest.raises(ConfigError, match="add a student or a second label set"):
        found.require("kl")


def test_unused_entries_of_adaptive_labels_are_left_out(inspected: Read) -> None:
    sample = make_sample(1, make_spec(kind=MassSpec(mass=0.5, cap=8)))
    assert (sample.topk_ids_NK == -1).any()
    plain = inspected("plain")
    found = InspectedSample(
        store="",
        label_set="",
        sample=sample,
        vocabulary=plain.vocabulary,
        prompt=[],
        response=[],
        predictions=(of_labels(sample, "labels"),),
    )
    described = describe(found, top=8)
    (model,) = described["models"]
    lengths = (sample.topk_ids_NK != -1).sum(axis=1).tolist()
    assert [len(row) for row in model["top_ids"]] == lengths
    assert [len(row) for row in model["top_logprobs"]] == lengths
    assert "-1" not in described["tokens"]


def test_the_description_is_json_and_holds_the_tables(inspected: Read) -> None:
    found = inspected("emoji")
    described = json.loads(json.dumps(describe(found, top=3), allow_nan=False))
    assert described["sample_key"] == found.key
    (model,) = described["models"]
    assert all(len(row) == 3 for row in model["top_ids"])
    for row in model["top_ids"]:
        assert all(str(token) in described["tokens"] for token in row)
    assert model["argmax"] == found.sample.topk_ids_NK[:, 0].tolist()
    assert list(model["values"]) == ["entropy", "tail", "surprise", "rank", "bridge"]


def test_a_position_that_is_not_labelled_is_refused(inspected: Read) -> None:
    found = inspected("plain")
    last = len(found.response) - 1
    assert found.row_of(last) == last
    with pytest.raises(ConfigError, match=f"position {last + 1} .* is not labelled"):
        found.row_of(last + 1)


def test_a_sample_that_is_not_stored_is_refused(inspector: Inspector) -> None:
    with pytest.raises(NotLabelledError, match="lacks 1 of 1 samples"):
        next(inspector.read(["0" * 32]))


# -- measures -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MEASURES)
def test_levels_rise_at_the_edges(name: str) -> None:
    measure = measure_named(name)
    assert list(measure.edges) == sorted(set(measure.edges))
    assert len(measure.edges) == 6
    assert measure.level(-1.0) == 0
    assert [measure.level(edge) for edge in measure.edges] == [1, 2, 3, 4, 5, 6]
    assert len(set(measure.ranges())) == 7


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(ConfigError, match="no measure 'confidence'; choose one of entropy"):
        measure_named("confidence")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("entropy", 0.5, "0.500"), ("tail", 0.25, "25.0 %"), ("tail", 1e-5, "0.001 %"),
     ("tail", 0.0, "0.0 %"), ("rank", 1200.0, "1,200")],
)  # fmt: skip
def test_values_for_people(name: str, value: float, text: str) -> None:
    assert measure_named(name).format(value) == text
