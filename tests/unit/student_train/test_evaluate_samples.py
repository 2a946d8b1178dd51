"""What an evaluation says of every sample adds up to what it says of all."""

import numpy as np
import torch

from storage.samples import LabelledSample
from storage.testing import make_sample, make_spec
from student_train.evaluate import _by_sample


def test_rows_go_to_their_samples() -> None:
    spec = make_spec()
    samples: list[LabelledSample] = [
        make_sample(number, spec, num_tokens=size) for number, size in enumerate((3, 1, 4))
    ]
    sizes = [len(sample.positions_N) for sample in samples]
    assert sizes == [3, 1, 4]
    kl_M = torch.tensor([1.0, 4.0, 2.0, 8.0, 0.0, 0.0, 5.0, 0.0])
    same_M = torch.tensor([True, False, True, True, False, False, False, True])
    found = _by_sample(samples, {"kl": kl_M, "agreement": same_M})
    assert [entry["sample_key"] for entry in found] == [sample.key for sample in samples]
    assert [entry["num_tokens"] for entry in found] == sizes
    assert [entry["kl"] for entry in found] == [7.0, 8.0, 5.0]
    assert [entry["agreement"] for entry in found] == [2.0, 1.0, 1.0]
    worst = [int(sample.positions_N[n]) for sample, n in zip(samples, (1, 0, 2), strict=True)]
    assert [entry["worst_position"] for entry in found] == worst
    assert np.isclose(sum(entry["kl"] for entry in found), float(kl_M.sum()))
