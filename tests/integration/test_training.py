"""Training with real DeepSpeed, as plain processes without Ray."""

from pathlib import Path

import numpy as np
import pytest

from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train.config import BatchConfig, LabelSource
from tests.integration.trainings import (
    Run,
    course_of_t,
    losses,
    read_metrics,
    train,
    train_all,
    write_job,
)

VOCAB_SIZE = 260
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-4}
"""Relative: ranks and stages add the same numbers in another order."""
STAGES = (0, 1, 2, 3)
CURVES = [("llama", "float32"), ("neox", "float32"), ("llama", "bfloat16")]
"""Llama with tied embeddings, NeoX with two."""


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
    course = course_of_t(uninterrupted)
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
    curves: dict[tuple[str, str, int, int], Path], others: dict[str, Path], uninterrupted: Path
) -> None:
    """The same samples in every step, one after the other in a row or each in a row of its own."""
    found, expected = others["padded"], uninterrupted
    assert [m["tokens"] for m in read_metrics(found)] == [
        m["tokens"] for m in read_metrics(expected)
    ]
    np.testing.assert_allclose(losses(found), losses(expected), rtol=TOLERANCE["float32"])


def test_the_share_of_waiting_for_data_is_in_the_metrics(uninterrupted: Path) -> None:
    for line in read_metrics(uninterrupted):
        assert line["data_wait_share"] == pytest.approx(line["data_wait_s"] / line["seconds"])
        assert 0 <= line["data_wait_share"] <= 1


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> dict[str, Path]:
    """Untrained students as they come from their configs: a small change has a small effect."""
    import torch
    from transformers import (
        AutoTokenizer,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(3)
    llama = LlamaConfig.from_pretrained(
        tiny_student, initializer_range=0.02, tie_word_embeddings=True, num_hidden_layers=2
    )
    neox = GPTNeoXConfig(
        vocab_size=llama.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    directories = {}
    for name, model in {
        "llama": LlamaForCausalLM(llama),
        "neox": GPTNeoXForCausalLM(neox),
    }.items():
        directories[name] = tmp_path_factory.mktemp("students") / name
        model.save_pretrained(directories[name])
        AutoTokenizer.from_pretrained(tiny_student).save_pretrained(directories[name])
    return directories


@pytest.fixture(scope="module")
def others(
    tmp_path_factory: pytest.TempPathFactory,
    labels: LabelSource,
    tiny_student: Path,
    tiny_teacher: Path,
) -> dict[str, Path]:
    """Trainings that go with the curves: of one rank without packing, of two with another loss."""
    folder = tmp_path_factory.mktemp("others")
    loss = {
        "soft": "jsd",
        "weight": {"type": "entropy", "measure": "power_sum"},
        "hard_term": "risk_guided",
        "student_entropy": 0.01,
    }
    batch = BatchConfig(tokens=60, micro_tokens=40, packing="padded")
    return {
        name: write_job(folder / name, labels, tiny_student, tiny_teacher, **changes)
        for name, changes in {"padded": {"batch": batch}, "risk": {"loss": loss}}.items()
    }


@pytest.fixture(scope="module")
def curves(
    tmp_path_factory: pytest.TempPathFactory,
    labels: LabelSource,
    students: dict[str, Path],
    tiny_teacher: Path,
    others: dict[str, Path],
) -> dict[tuple[str, str, int, int], Path]:
    """Trainings by student, dtype, stage and ranks, with several micro-batches and clipping."""
    folder = tmp_path_factory.mktemp("curves")
    jobs = {
        (student, dtype, stage, ranks): write_job(
            folder / f"{student}-{dtype}-{stage}-{ranks}",
            labels,
            students[student],
            tiny_teacher,
            dtype=dtype,
            deepspeed={"stage": stage},
            batch=BatchConfig(tokens=120, micro_tokens=30, row_tokens=15),
            optimizer={"lr": 1e-3, "max_grad_norm": 0.3},
            checkpoint={"every_steps": 1000},
        )
        for student, dtype in CURVES
        for stage in STAGES
        for ranks in (1, 2)
        # one rank at every stage for one of them, and at stage 0 to compare the others with
        if ranks == 2 or stage == 0 or (student, dtype) == CURVES[0]
    }
    for ranks, other in ((1, "padded"), (2, "risk")):
        runs = [Run(job) for key, job in jobs.items() if key[3] == ranks] + [Run(others[other])]
        assert set(train_all(folder, runs, world_size=ranks)) == {"done"}
    return jobs


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("student", "dtype"), CURVES)
def test_every_stage_and_number_of_ranks_gives_the_same_curve(
    student: str, dtype: str, stage: int, curves: dict[tuple[str, str, int, int], Path]
) -> None:
    """One normaliser per step: the number of ranks and of micro-batches cancels out."""
    expected = curves[student, dtype, 0, 1]
    hard = [line["hard"] for line in read_metrics(expected)]
    assert hard[-1] < hard[0]
    for found in (curves[key] for key in curves if key[:3] == (student, dtype, stage)):
        np.testing.assert_allclose(losses(found), losses(expected), rtol=TOLERANCE[dtype])
        np.testing.assert_allclose(course_of_t(found), course_of_t(expected), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_knows_the_norm_of_the_gradient_before_it_is_clipped(
    stage: int, curves: dict[tuple[str, str, int, int], Path]
) -> None:
    norms = [
        [line["grad_norm"] for line in read_metrics(curves["llama", "float32", number, 2])]
        for number in (0, stage)
    ]
    assert max(norms[0]) > 0.3
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)


def test_bfloat16_follows_float32(curves: dict[tuple[str, str, int, int], Path]) -> None:
    found, expected = curves["llama", "bfloat16", 0, 1], curves["llama", "float32", 0, 1]
    np.testing.assert_allclose(losses(found), losses(expected), rtol=2e-3)


def test_weights_by_entropy_a_jsd_and_the_risk_guided_term_learn_together(
    curves: dict[tuple[str, str, int, int], Path], others: dict[str, Path]
) -> None:
    metrics = read_metrics(others["risk"])
    for name in ("soft", "hard", "risk"):
        curve = [line[name] for line in metrics]
        assert np.mean(curve[-3:]) < np.mean(curve[:3])
    assert all(0 < line["soft_weight"] < 1 for line in metrics)
    for line in metrics:
        assert line["soft_weight"] + line["hard_weight"] == pytest.approx(1)
        assert "t" not in line
