"""ZeRO with its state in host memory. DeepSpeed's Adam is compiled for it, which takes minutes."""

from pathlib import Path

import numpy as np
import pytest

from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train.config import LabelSource
from tests.integration.trainings import Run, losses, train_all, write_job

KINDS = {
    "stage 1": {"stage": 1, "offload_optimizer": True},
    "stage 2": {"stage": 2, "offload_optimizer": True},
    "stage 3": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}


def test_offload_gives_the_same_curve_and_resumes(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock file that a killed build left is in the way, and holds up nothing."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    store = LabelStore(str(tmp_path / "store"), create=True)
    spec = make_spec(k=8, vocab_size=260)
    samples = [make_sample(n, spec, num_tokens=3 + n % 8) for n in range(24)]
    label_set = store.create(spec, {})
    label_set.append(samples, {})
    requests = tuple(SampleRequest(s.key, 0, s.prompt_ids_P, None, ()) for s in samples)
    labels = LabelSource(
        store=store.uri,
        label_set=label_set.key,
        selection=Selection(requests).save(store.objects),
    )
    optimizer = {"type": "cpu_adam", "lr": 1e-3}
    inputs = (labels, tiny_student, tiny_teacher)
    plain = write_job(tmp_path / "plain", *inputs)
    whole, resumed = (
        {
            kind: write_job(
                tmp_path / f"{name} {kind}", *inputs, optimizer=optimizer, deepspeed=deepspeed
            )
            for kind, deepspeed in KINDS.items()
        }
        for name in ("whole", "resumed")
    )
    runs = [
        Run(plain),
        *[Run(job) for job in whole.values()],
        *[Run(job, steps=3) for job in resumed.values()],
        *[Run(job) for job in resumed.values()],
    ]
    outcomes = train_all(tmp_path, runs, world_size=2, timeout_s=1800)
    assert outcomes == [*["done"] * 4, *["stopped after 3"] * 3, *["done"] * 3]
    for kind, job in whole.items():
        np.testing.assert_allclose(losses(job), losses(plain), rtol=1e-4, err_msg=kind)
        assert losses(resumed[kind]) == losses(job), kind
