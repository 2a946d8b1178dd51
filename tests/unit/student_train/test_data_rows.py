"""What becomes of a sample's columns on the way to the losses."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from storage.columns import POWERS
from storage.keys import ColumnSpec, CountsSpec, LabelSetSpec, MassSpec, StratifiedSpec
from storage.samples import LabelledSample
from storage.tail import LOG_ZERO
from storage.testing import make_sample, make_spec
from student_train.losses.base import PADDING_ID
from student_train.streaming.teacher_rows import SIDECAR, teacher_rows

SPEC = make_spec(vocab_size=40)


def make(*columns: ColumnSpec, k: int = 4) -> tuple[list[LabelledSample], LabelSetSpec]:
    spec = make_spec(k=k, vocab_size=40, columns=columns)
    return [make_sample(number, spec, num_tokens=3 + number) for number in range(3)], spec


def test_the_hard_label_is_the_stored_token_or_the_teachers_likeliest(
    samples: list[LabelledSample],
) -> None:
    tokens = np.concatenate([sample.response_ids_R for sample in samples])
    likeliest = np.concatenate([sample.topk_ids_NK[:, 0] for sample in samples])
    assert teacher_rows(samples, "sampled", SPEC).hard_M.tolist() == tokens.tolist()
    assert teacher_rows(samples, "dataset", SPEC).hard_M.tolist() == tokens.tolist()
    assert teacher_rows(samples, "argmax", SPEC).hard_M.tolist() == likeliest.tolist()
    assert (tokens != likeliest).any()


def test_random_hard_labels_are_the_same_in_every_batch(samples: list[LabelledSample]) -> None:
    together = teacher_rows(samples, "random", SPEC).hard_M
    alone = [teacher_rows([sample], "random", SPEC).hard_M for sample in reversed(samples)]
    assert torch.equal(together, torch.cat(alone[::-1]))
    assert ((together >= 0) & (together < 40)).all()


def test_labels_keep_their_dtypes(samples: list[LabelledSample]) -> None:
    rows = teacher_rows(samples, "sampled", SPEC)
    assert rows.hard_M.dtype == rows.topk_ids_MK.dtype == torch.int64
    assert rows.topk_logprobs_MK.dtype == rows.log_tail_mass_M.dtype == torch.float32


def test_the_stored_form_of_no_tail_is_no_mass(samples: list[LabelledSample]) -> None:
    """e**-100 is a float32 above 0: a student without a tail would be infinitely wrong."""
    sample = replace(samples[0], log_tail_mass_N=np.array([LOG_ZERO, -99.0], np.float32))
    found = teacher_rows([sample], "sampled", SPEC).log_tail_mass_M
    assert found.tolist() == [-math.inf, -99.0]


def test_the_response_tokens_log_prob_is_kept_whatever_the_hard_label_is(
    samples: list[LabelledSample],
) -> None:
    expected = np.concatenate([sample.token_logprob_N for sample in samples])
    for hard in ("sampled", "argmax", "random"):
        found = teacher_rows(samples, hard, SPEC).token_logprob_M  # type: ignore[arg-type]
        assert found is not None
        assert np.array_equal(found.numpy(), expected)


def test_rows_know_their_document(samples: list[LabelledSample]) -> None:
    found = teacher_rows(samples, "sampled", SPEC).document_M
    assert found is not None
    assert found.tolist() == [n for n, sample in enumerate(samples) for _ in sample.positions_N]


def test_columns_that_are_not_stored_are_absent() -> None:
    samples, spec = make()
    rows = teacher_rows(samples, "sampled", spec)
    assert rows.entropy_M is rows.tail_ids_MS is rows.tail_weights_MS is rows.sidecar_M is None
    assert rows.log_power_sums == rows.power_slopes == {}


def test_scalar_columns_arrive_by_their_names() -> None:
    samples, spec = make("entropy", "power_sum_10", "power_sum_200", "power_sum_400", "power_sums")
    rows = teacher_rows(samples, "sampled", spec)
    assert rows.entropy_M is not None
    assert rows.entropy_M.tolist() == pytest.approx(
        [value for sample in samples for value in sample.optional["entropy"]]
    )
    assert set(rows.log_power_sums) == set(POWERS)
    assert set(rows.power_slopes) == {"25", "50", "75"}
    for name, column in rows.log_power_sums.items():
        expected = np.concatenate([sample.optional[f"log_power_sum_{name}"] for sample in samples])
        assert np.array_equal(column.numpy(), expected)
    for name, column in rows.power_slopes.items():
        expected = np.concatenate([sample.optional[f"power_slope_{name}"] for sample in samples])
        assert np.array_equal(column.numpy(), expected)


@pytest.mark.parametrize(
    ("spec", "covers_all"), [(StratifiedSpec(draws=3), False), (CountsSpec(draws=6), True)]
)
def test_tail_samples_are_padded_to_the_widest(
    spec: StratifiedSpec | CountsSpec, covers_all: bool
) -> None:
    samples, label_spec = make(spec)
    widths = [sample.optional["tail_ids"].shape[1] for sample in samples]
    rows = teacher_rows(samples, "sampled", label_spec)
    assert rows.samples_cover_all == covers_all
    assert rows.tail_ids_MS is not None
    assert rows.tail_weights_MS is not None
    assert rows.tail_ids_MS.dtype == torch.int64
    start = 0
    for sample, width in zip(samples, widths, strict=True):
        stop = start + len(sample.positions_N)
        ids, weights = rows.tail_ids_MS[start:stop], rows.tail_weights_MS[start:stop]
        assert ids[:, :width].tolist() == sample.optional["tail_ids"].tolist()
        assert weights[:, :width].tolist() == sample.optional["tail_weights"].tolist()
        assert (ids[:, width:] == PADDING_ID).all()
        assert (weights[:, width:] == 0).all()
        start = stop
    assert rows.tail_ids_MS.shape[1] == max(widths)


def test_rows_that_keep_fewer_tokens_have_unused_entries() -> None:
    spec = make_spec(vocab_size=40, kind=MassSpec(mass=0.5, cap=6))
    rows = teacher_rows([make_sample(0, spec)], "argmax", spec)
    unused = rows.topk_ids_MK == PADDING_ID
    assert unused.any()
    assert (rows.topk_logprobs_MK[unused] == -math.inf).all()


def test_the_column_of_a_sidecar_arrives(samples: list[LabelledSample]) -> None:
    weights = np.array([0.25, 0.5], np.float32)
    sample = replace(samples[0], optional={**samples[0].optional, SIDECAR: weights})
    found = teacher_rows([sample], "sampled", SPEC).sidecar_M
    assert found is not None
    assert found.tolist() == [0.25, 0.5]
