"""Training with real DeepSpeed, as plain processes without Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train.config import (
    BatchConfig,
    DeepSpeedConfig,
    LabelSource,
    OptimizerConfig,
    TrainConfig,
    TrainJob,
)

REPOSITORY = Path(__file__).parent.parent.parent
VOCAB_SIZE = 260
TAID = {"soft": "taid", "schedule": {"alpha": 0.2}}
"""A hybrid whose soft term has a state of its own: t."""
FP32_LOSS = 1e-5
"""Relative: ranks add the same numbers in another order."""


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> LabelSource:
    """Labels of 24 made-up samples with 3 to 10 tokens each."""
    store = LabelStore(str(tmp_path_factory.mktemp("store")), create=True)
    spec = make_spec(k=8, vocab_size=VOCAB_SIZE, columns=("entropy", "power_sum_10"))
    samples = [make_sample(n, spec, num_tokens=3 + n % 8) for n in range(24)]
    label_set = store.create(spec, {})
    label_set.append(samples, {})
    requests = tuple(SampleRequest(s.key, 0, s.prompt_ids_P, None, ()) for s in samples)
    selection = Selection(requests).save(store.objects)
    return LabelSource(store=store.uri, label_set=label_set.key, selection=selection)


def write_job(
    output: Path, labels: LabelSource, student: Path, teacher: Path, **train: object
) -> Path:
    settings: dict[str, object] = {
        "model": str(student),
        "loss": TAID,
        "optimizer": OptimizerConfig(lr=1e-3),
        "batch": BatchConfig(tokens=60, micro_tokens=40),
        "dtype": "float32",
        "epochs": 2,
        "checkpoint_every_steps": 2,
        **train,
    }
    job = TrainJob(
        labels=labels,
        model=str(student),
        tokenizer=str(teacher),
        train=TrainConfig.model_validate(settings),
        output=str(output),
        card={"student": "tiny"},
    )
    output.mkdir(parents=True)
    path = output / "job.json"
    path.write_text(job.model_dump_json())
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def train(job: Path, *, world_size: int = 1) -> list[dict[str, float]]:
    launcher = [sys.executable, "-m", "student_train"]
    if world_size > 1:
        launcher = [
            *[sys.executable, "-m", "torch.distributed.run", "--standalone"],
            *["--nproc-per-node", str(world_size), "-m", "student_train"],
        ]
    done = subprocess.run(
        [*launcher, str(job)],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(job)


def read_metrics(job: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (job.parent / "metrics.jsonl").read_text().splitlines()]


def losses(metrics: list[dict[str, float]]) -> list[float]:
    return [line["loss"] for line in metrics]


def course_of_t(metrics: list[dict[str, float]]) -> list[float]:
    return [line["t"] for line in metrics]


def kill_after_the_first_checkpoint(job: Path) -> None:
    """Start a training and kill it as soon as it could be resumed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "student_train", str(job)],
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    pointer = job.parent / "checkpoints" / "latest.json"
    deadline = time.monotonic() + 120
    while not pointer.exists():
        assert process.poll() is None, "the training ended before its first checkpoint was seen"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
    labels: LabelSource,
    tiny_student: Path,
    tiny_teacher: Path,
) -> Path:
    job = write_job(tmp_path_factory.mktemp("run") / "out", labels, tiny_student, tiny_teacher)
    train(job)
    return job


def test_a_student_learns_the_labels_and_its_export_loads_and_answers(uninterrupted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metrics = read_metrics(uninterrupted)
    curve = [line["hard"] for line in metrics]  # the soft term is measured against a moving target
    assert np.mean(curve[-3:]) < np.mean(curve[:3])
    course = course_of_t(metrics)
    assert course[:2] == [0.4, 0.4]  # the first loss is only remembered
    assert course[1:] == sorted(set(course))
    directory = uninterrupted.parent / "model"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=ids * 0 + 1)
    assert answer.shape[1] > ids.shape[1]
    assert "label cache" in (directory / "README.md").read_text()


def test_padding_changes_nothing_about_the_loss(
    tmp_path: Path,
    labels: LabelSource,
    tiny_student: Path,
    tiny_teacher: Path,
    uninterrupted: Path,
) -> None:
    """The same samples in every step, one after the other in a row or each in a row of its own."""
    batch = BatchConfig(tokens=60, micro_tokens=40, packing="padded")
    job = write_job(tmp_path / "out", labels, tiny_student, tiny_teacher, batch=batch)
    found, expected = train(job), read_metrics(uninterrupted)
    assert [m["tokens"] for m in found] == [m["tokens"] for m in expected]
    np.testing.assert_allclose(losses(found), losses(expected), rtol=FP32_LOSS)


def test_the_share_of_waiting_for_data_is_in_the_metrics(uninterrupted: Path) -> None:
    for line in read_metrics(uninterrupted):
        assert line["data_wait_share"] == pytest.approx(line["data_wait_s"] / line["seconds"])
        assert 0 <= line["data_wait_share"] <= 1


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_give_the_loss_of_one(
    stage: int,
    tmp_path: Path,
    labels: LabelSource,
    tiny_student: Path,
    tiny_teacher: Path,
    uninterrupted: Path,
) -> None:
    """One normaliser per step: the number of ranks and of micro-batches cancels out."""
    job = write_job(
        tmp_path / "out",
        labels,
        tiny_student,
        tiny_teacher,
        deepspeed=DeepSpeedConfig(stage=stage),
    )
    found, expected = train(job, world_size=2), read_metrics(uninterrupted)
    np.testing.assert_allclose(losses(found), losses(expected), rtol=FP32_LOSS)
    np.testing.assert_allclose(course_of_t(found), course_of_t(expected), rtol=FP32_LOSS)


def test_a_killed_training_resumes_bit_identically(
    tmp_path: Path,
    labels: LabelSource,
    tiny_student: Path,
    tiny_teacher: Path,
    uninterrupted: Path,
) -> None:
    job = write_job(tmp_path / "out", labels, tiny_student, tiny_teacher)
    kill_after_the_first_checkpoint(job)
    assert not (job.parent / "model").exists()
    found, expected = train(job), read_metrics(uninterrupted)
    assert losses(found) == losses(expected)
    assert course_of_t(found) == course_of_t(expected)
    assert not (job.parent / "checkpoints").exists()


def test_bfloat16_follows_float32(
    tmp_path: Path,
    labels: LabelSource,
    tiny_student: Path,
    tiny_teacher: Path,
    uninterrupted: Path,
) -> None:
    job = write_job(
        tmp_path / "out",
        labels,
        tiny_student,
        tiny_teacher,
        dtype="bfloat16",
        deepspeed=DeepSpeedConfig(stage=1),
    )
    np.testing.assert_allclose(losses(train(job)), losses(read_metrics(uninterrupted)), rtol=0.03)


def test_weights_by_entropy_a_jsd_and_the_risk_guided_term_learn_together(
    tmp_path: Path, labels: LabelSource, tiny_student: Path, tiny_teacher: Path
) -> None:
    loss = {
        "soft": "jsd",
        "weight": {"type": "entropy", "measure": "power_sum"},
        "hard_term": "risk_guided",
        "student_entropy": 0.01,
    }
    job = write_job(tmp_path / "out", labels, tiny_student, tiny_teacher, loss=loss)
    metrics = train(job, world_size=2)
    for name in ("soft", "hard", "risk"):
        curve = [line[name] for line in metrics]
        assert np.mean(curve[-3:]) < np.mean(curve[:3])
    assert all(0 < line["soft_weight"] < 1 for line in metrics)
    for line in metrics:
        assert line["soft_weight"] + line["hard_weight"] == pytest.approx(1)
        assert "t" not in line
