"""A training that is interrupted in any way ends as if it had not been."""

import random
import signal
from pathlib import Path

import numpy as np
import pytest

from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec
from student_train.config import LabelSource
from tests.integration.trainings import (
    Run,
    course_of_t,
    kill,
    losses,
    start,
    train,
    train_all,
    wait_for_step,
    write_job,
)

KINDS: dict[str, dict[str, object]] = {
    **{f"float32-{stage}": {"deepspeed": {"stage": stage}} for stage in (0, 1, 2, 3)},
    # in bfloat16, stages 0 and 1 have optimisers of their own, 2 and 3 those of float32
    **{
        f"bfloat16-{stage}": {"dtype": "bfloat16", "deepspeed": {"stage": stage}}
        for stage in (0, 1)
    },
    # its dropout draws random numbers, which have to go on too
    "lora-2": {"lora": {"r": 4, "dropout": 0.1}, "deepspeed": {"stage": 2}},
}
LONG = {"epochs": 15, "deepspeed": {"stage": 2}, "checkpoint": {"every_steps": 3}}
"""Long enough to be interrupted while it runs."""
RESIZED = [kind for kind in KINDS if kind != "lora-2"]
"""Kinds whose loss does not depend on the number of ranks: dropout does."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Relative, for another number of ranks. The student's curve is a rough one, on which rounding to
bfloat16 grows from step to step."""


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> LabelSource:
    """Labels of 24 made-up samples with 3 to 10 tokens each."""
    store = LabelStore(str(tmp_path_factory.mktemp("store")), create=True)
    spec = make_spec(k=8, vocab_size=260)
    samples = [make_sample(n, spec, num_tokens=3 + n % 8) for n in range(24)]
    label_set = store.create(spec, {})
    label_set.append(samples, {})
    requests = tuple(SampleRequest(s.key, 0, s.prompt_ids_P, None, ()) for s in samples)
    selection = Selection(requests).save(store.objects)
    return LabelSource(store=store.uri, label_set=label_set.key, selection=selection)


@pytest.fixture(scope="module")
def jobs(
    tmp_path_factory: pytest.TempPathFactory,
    labels: LabelSource,
    tiny_student: Path,
    tiny_teacher: Path,
) -> dict[str, dict[str, Path]]:
    """Trainings without interruption, stopped and gone on, and with changing ranks: 2, 1, 2."""
    folder = tmp_path_factory.mktemp("resume")
    whole, resumed, resized = (
        {
            kind: write_job(
                folder / f"{name}-{kind}", labels, tiny_student, tiny_teacher, **KINDS[kind]
            )
            for kind in kinds
        }
        for name, kinds in {"whole": KINDS, "resumed": KINDS, "resized": RESIZED}.items()
    )
    whole["long"] = write_job(folder / "long", labels, tiny_student, tiny_teacher, **LONG)
    runs = {
        "done": [Run(job) for job in whole.values()],
        "stopped after 3": [Run(job, 3) for job in (*resumed.values(), *resized.values())],
    }
    expected = [outcome for outcome, group in runs.items() for _ in group]
    resumptions = [Run(job) for job in resumed.values()]
    all_runs = [*runs["done"], *runs["stopped after 3"], *resumptions]
    outcomes = train_all(folder, all_runs, world_size=2)
    assert outcomes == [*expected, *["done"] * len(resumptions)]
    alone = train_all(folder, [Run(job, 2) for job in resized.values()], world_size=1)
    assert alone == ["stopped after 5"] * len(resized)
    again = train_all(folder, [Run(job) for job in resized.values()], world_size=2)
    assert again == ["done"] * len(resized)
    return {"whole": whole, "resumed": resumed, "resized": resized}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_is_bit_identical(kind: str, jobs: dict[str, dict[str, Path]]) -> None:
    whole, resumed = jobs["whole"][kind], jobs["resumed"][kind]
    assert losses(resumed) == losses(whole)
    assert course_of_t(resumed) == course_of_t(whole)
    assert not (resumed.parent / "checkpoints").exists()


@pytest.mark.parametrize("kind", RESIZED)
def test_the_number_of_ranks_may_change_twice(kind: str, jobs: dict[str, dict[str, Path]]) -> None:
    """The samples of all steps stay the same, and the loss up to rounding."""
    whole, resized = jobs["whole"][kind], jobs["resized"][kind]
    tolerance = TOLERANCE[kind.partition("-")[0]]
    np.testing.assert_allclose(losses(resized), losses(whole), rtol=tolerance)
    np.testing.assert_allclose(course_of_t(resized), course_of_t(whole), rtol=tolerance)


def test_killed_at_a_random_step_it_goes_on_bit_identically(
    tmp_path: Path,
    labels: LabelSource,
    tiny_student: Path,
    tiny_teacher: Path,
    jobs: dict[str, dict[str, Path]],
) -> None:
    """All ranks are killed at once, at whatever they do at that moment."""
    job = write_job(tmp_path / "out", labels, tiny_student, tiny_teacher, **LONG)
    process = start(job, world_size=2)
    wait_for_step(process, job, random.Random().randrange(1, 30))
    kill(process)
    assert not (job.parent / "model").exists()
    train(job, world_size=2)
    assert losses(job) == losses(jobs["whole"]["long"])


def test_sigterm_saves_and_exits_with_143(
    tmp_path: Path, labels: LabelSource, tiny_student: Path, tiny_teacher: Path
) -> None:
    """Nothing is repeated: the checkpoint is of the step at which it stopped."""
    settings = {**LONG, "checkpoint": {"every_steps": 1000}}
    job = write_job(tmp_path / "out", labels, tiny_student, tiny_teacher, **settings)
    process = start(job)
    wait_for_step(process, job, 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    done = len(losses(job))
    assert process.returncode == 143, errors
    assert f"after step {done} of" in errors
    saved = [path.name for path in (job.parent / "checkpoints").glob("step-*")]
    assert saved == [f"step-{done:08d}"]
    before = losses(job)
    steps = [line["step"] for line in train(job)]
    assert steps == list(range(1, len(steps) + 1))
    assert losses(job)[:done] == before
