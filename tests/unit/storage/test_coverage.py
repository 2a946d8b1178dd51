"""How much is stored, by the obvious arithmetic."""

from dataclasses import replace

import numpy as np
import pytest

from storage.coverage import CoverageCount
from storage.keys import MassSpec
from storage.testing import make_sample, make_spec


def test_percentiles_are_those_of_all_rows() -> None:
    spec = make_spec()
    samples = [make_sample(number, spec, num_tokens=20 + number) for number in range(5)]
    samples[4] = replace(samples[4], finish_reason="stop")
    count = CoverageCount()
    for sample in samples:
        count.add(sample)
    found = count.result()
    kept_N = np.concatenate([np.exp(s.topk_logprobs_NK).sum(axis=1) for s in samples])
    for percent in (1, 5, 50):
        expected = np.percentile(kept_N, percent)
        assert found.kept_mass[f"p{percent}"] == pytest.approx(expected, abs=1e-5)
    for percent in (50, 95, 99):
        expected = np.percentile(1 - kept_N, percent)
        assert found.tail_mass[f"p{percent}"] == pytest.approx(expected, abs=1e-5)
    assert (found.num_samples, found.num_rows, found.mean_kept_ids) == (5, 110, 8.0)
    assert found.finish_reasons == {"length": 0.8, "stop": 0.2}


def test_unused_entries_of_adaptive_heads_do_not_count() -> None:
    spec = make_spec(kind=MassSpec(mass=0.5, cap=8))
    sample = make_sample(0, spec, num_tokens=30)
    count = CoverageCount()
    count.add(sample)
    assert count.result().mean_kept_ids == (sample.topk_ids_NK >= 0).sum() / 30 < 8
