"""A watched training on two ranks: evaluation, TensorBoard, the best student, early stop."""

import json
from pathlib import Path
from typing import Any

import pytest

from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train.config import LabelSource, TrainJob
from student_train.losses.measures import HELD_OUT_MEASURES, STEP_MEASURES
from tests.integration.trainings import Run, losses, read_metrics, train_all, write_job

EVERY = 3
BEST = {"heldout": {"every_steps": EVERY, "samples": 5}, "best": {"metric": "kl"}}
STOP = {
    "heldout": {"every_steps": 2, "samples": 5, "generations": 0},
    "early_stop": {"metric": "agreement", "patience": 1, "min_delta": 1.0},
}
"""No agreement rises by 1, so the second evaluation is in vain."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[LabelSource, LabelSource]:
    """Labels of 24 samples to train on and of 7 others to measure with."""
    store = LabelStore(str(tmp_path_factory.mktemp("store")), create=True)
    spec = make_spec(k=8, vocab_size=260, columns=("entropy",))
    samples = [make_sample(n, spec, num_tokens=3 + n % 8) for n in range(31)]
    label_set = store.create(spec, {})
    label_set.append(samples, {})
    requests = [SampleRequest(s.key, 0, s.prompt_ids_P, None, ()) for s in samples]
    train, heldout = (
        LabelSource(
            store=store.uri,
            label_set=label_set.key,
            selection=Selection(tuple(part)).save(store.objects),
        )
        for part in (requests[:24], requests[24:])
    )
    return train, heldout


@pytest.fixture(scope="module")
def jobs(
    tmp_path_factory: pytest.TempPathFactory,
    sources: tuple[LabelSource, LabelSource],
    tiny_student: Path,
    tiny_teacher: Path,
) -> dict[str, Path]:
    """Trainings that ended: without and with evaluation, interrupted, and stopped early."""
    folder = tmp_path_factory.mktemp("runs")
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "watched": BEST,
        "interrupted": BEST,
        "stopped": STOP,
    }
    paths = {}
    for name, changes in settings.items():
        path = write_job(folder / name, sources[0], tiny_student, tiny_teacher, **changes)
        job = TrainJob.model_validate_json(path.read_text())
        path.write_text(job.model_copy(update={"heldout": sources[1]}).model_dump_json())
        paths[name] = path
    runs = [Run(paths["plain"]), Run(paths["watched"]), Run(paths["interrupted"], 7)]
    runs += [Run(paths["interrupted"]), Run(paths["stopped"])]
    outcomes = train_all(folder, runs, world_size=2)
    assert outcomes == ["done", "done", "stopped after 7", "done", "done"]
    return paths


def evaluations(job: Path) -> list[dict[str, float]]:
    lines = (job.parent / "heldout.jsonl").read_text().splitlines()
    found: list[dict[str, float]] = [json.loads(line) for line in lines]
    return [{name: line[name] for name in line if name != "seconds"} for line in found]


def selection(job: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.parent / "selection.json").read_text())
    return found


def test_a_step_reports_everything(jobs: dict[str, Path]) -> None:
    for line in read_metrics(jobs["watched"]):
        expected = {
            *("loss", "soft", "hard", "soft_weight", "hard_weight", "agreement"),
            *("t", "t_momentum", "t_change", "grad_norm", "lr", "teacher_entropy"),
            *("tokens_per_s", "data_wait_share", "memory_gib", "model_tflops"),
            *STEP_MEASURES,
        }
        assert expected <= set(line)
        assert line["grad_norm"] > 0
        assert line["memory_gib"] > 0
        assert line["model_tflops"] > 0
        assert line["teacher_topk_mass"] + line["teacher_tail_mass"] == pytest.approx(1)
        assert line["student_topk_mass"] + line["student_tail_mass"] == pytest.approx(1)
        assert 0 < line["overlap"] < 1
        assert line["teacher_category_entropy"] <= line["teacher_entropy"]


def test_evaluation_changes_no_bit_of_the_losses(jobs: dict[str, Path]) -> None:
    assert losses(jobs["watched"]) == losses(jobs["plain"])
    assert not (jobs["plain"].parent / "heldout.jsonl").read_text()


def test_evaluations_are_in_the_log(jobs: dict[str, Path]) -> None:
    total = len(read_metrics(jobs["watched"]))
    found = evaluations(jobs["watched"])
    assert [line["step"] for line in found] == [*range(EVERY, total, EVERY), total]
    assert all(set(HELD_OUT_MEASURES) <= set(line) for line in found)
    assert found[-1]["cross_entropy"] < found[0]["cross_entropy"]
    lines = (jobs["watched"].parent / "generations.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["samples"]) for line in lines] == [2] * len(found)


def test_tensorboard_shows_the_same_numbers(jobs: dict[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("watched", "interrupted"):
        events = EventAccumulator(str(jobs[name].parent / "tensorboard"))
        events.Reload()
        for group, lines in (
            ("train", read_metrics(jobs[name])),
            ("heldout", evaluations(jobs[name])),
        ):
            metric = "loss" if group == "train" else "kl"
            shown = [(event.step, event.value) for event in events.Scalars(f"{group}/{metric}")]
            assert shown == [(line["step"], pytest.approx(line[metric])) for line in lines]


def test_the_best_student_is_exported_also_after_a_resume(jobs: dict[str, Path]) -> None:
    found = evaluations(jobs["watched"])
    best = min(found, key=lambda line: line["kl"])["step"]
    weights = []
    for name in ("watched", "interrupted"):
        assert evaluations(jobs[name]) == found
        assert selection(jobs[name])["exported_step"] == best
        assert not (jobs[name].parent / "best").exists()
        model = jobs[name].parent / "model"
        card = (model / "README.md").read_text()
        assert "favours soft labels" in card
        assert f"| exported step | {best} of " in card
        weights.append((model / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_training_in_vain_ends_early(jobs: dict[str, Path]) -> None:
    assert len(read_metrics(jobs["stopped"])) == 4
    found = selection(jobs["stopped"])
    assert (found["finished_steps"], found["exported_step"]) == (4, 4)
    assert found["warning"] is None
    assert losses(jobs["stopped"]) == losses(jobs["plain"])[:4]
    assert (jobs["stopped"].parent / "model" / "config.json").is_file()
