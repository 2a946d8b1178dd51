"""Weights out of a sidecar: those of the right sample and position, or a refusal."""

from collections.abc import Sequence

import numpy as np
import pytest

from storage.errors import NotLabelledError
from storage.label_set import LabelSet
from storage.samples import LabelledSample
from storage.sidecar import SidecarSpec
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train.config import LabelSource
from student_train.errors import PreflightError
from student_train.streaming.reader import LabelReader, collate
from student_train.weights.config import SidecarWeightConfig, StaticWeightConfig
from tests.unit.student_train.weight_rows import assert_blend, random_teachers, rows_of, weigh

SPEC = SidecarSpec(producer={"estimator": "test"}, columns=("kappa", "soft_weight"))


def weights_of(sample: LabelledSample) -> np.ndarray:
    """Different for every sample and position."""
    return (np.arange(len(sample.positions_N)) + 1 + int(sample.key[-2:], 16)) / 300


def write(label_set: LabelSet, samples: Sequence[LabelledSample], *, scale: float = 1.0) -> None:
    label_set.sidecar(SPEC).append(
        {s.key: {"soft_weight": scale * weights_of(s), "kappa": 0 * weights_of(s)} for s in samples}
    )


def open_set(labels: LabelSource) -> LabelSet:
    return LabelStore(labels.store).open(labels.label_set)


def test_every_row_gets_the_number_of_its_sample_and_position(
    labels: LabelSource, samples: list[LabelledSample]
) -> None:
    write(open_set(labels), samples[3:])  # in two parts, not in the order of the selection
    write(open_set(labels), samples[:3])
    reader = LabelReader(labels, SidecarWeightConfig(sidecar=SPEC.key))
    rows = collate(reader.read([4, 0, 2]), "sampled", reader.spec).labels
    expected = np.concatenate([weights_of(samples[n]) for n in (4, 0, 2)])
    assert rows.sidecar_M is not None
    np.testing.assert_allclose(rows.sidecar_M.numpy(), expected, rtol=1e-6)


def test_a_sidecar_of_a_smaller_set_serves_its_samples_in_a_larger_one(
    labels: LabelSource, samples: list[LabelledSample]
) -> None:
    """The tokens of a generation are the same whatever is kept of every distribution."""
    small = make_spec(k=3, vocab_size=40)
    kept = LabelStore(labels.store).create(small, {})
    kept.append([make_sample(number, small, num_tokens=2 + number) for number in range(6)], {})
    write(kept, samples)
    reader = LabelReader(labels, SidecarWeightConfig(sidecar=SPEC.key))
    (found,) = reader.read([1])
    np.testing.assert_allclose(found.optional["sidecar"], weights_of(samples[1]), rtol=1e-6)
    assert found.topk_ids_NK.shape[1] == 8


def test_other_policies_read_no_sidecar(labels: LabelSource, samples: list[LabelledSample]) -> None:
    write(open_set(labels), samples)
    for reader in (LabelReader(labels), LabelReader(labels, StaticWeightConfig())):
        assert "sidecar" not in reader.read([0])[0].optional


def test_a_sidecar_that_does_not_exist_is_refused(labels: LabelSource) -> None:
    with pytest.raises(PreflightError, match="has the sidecar " + "a" * 32):
        LabelReader(labels, SidecarWeightConfig(sidecar="a" * 32))


def test_an_unknown_column_is_refused(labels: LabelSource, samples: list[LabelledSample]) -> None:
    write(open_set(labels), samples)
    with pytest.raises(PreflightError, match=r"no column 'risk', it has kappa, soft_weight"):
        LabelReader(labels, SidecarWeightConfig(sidecar=SPEC.key, column="risk"))


def test_a_sample_without_numbers_is_refused(
    labels: LabelSource, samples: list[LabelledSample]
) -> None:
    write(open_set(labels), samples[:-1])
    with pytest.raises(NotLabelledError, match=f"for 1 of 6 samples .*{samples[-1].key}"):
        LabelReader(labels, SidecarWeightConfig(sidecar=SPEC.key))


def test_numbers_that_are_no_weights_are_refused(
    labels: LabelSource, samples: list[LabelledSample]
) -> None:
    write(open_set(labels), samples, scale=10.0)
    with pytest.raises(PreflightError, match="outside 0 to 1"):
        LabelReader(labels, SidecarWeightConfig(sidecar=SPEC.key))


def test_a_sidecar_is_taken_as_it_is() -> None:
    rows = rows_of(random_teachers(5))
    assert_blend(weigh(rows, "sidecar"), [0.0, 0.25, 0.5, 0.75, 1.0])
