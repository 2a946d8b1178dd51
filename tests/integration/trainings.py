"""Trainings as processes of their own: one alone, or several, one after the other, on some ranks.

Starting processes costs more than a tiny training, so tests put many through one group of them.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]

from student_train.config import BatchConfig, LabelSource, OptimizerConfig, TrainConfig, TrainJob

REPOSITORY = Path(__file__).parent.parent.parent
TAID = {"soft": "taid", "schedule": {"alpha": 0.2}}
"""A hybrid whose soft term has a state of its own: t."""

ONE_AFTER_THE_OTHER = """
import json, os, sys
from student_train.config import TrainJob
from student_train.errors import StudentError, TrainingStoppedError
from student_train.trainer import train_student

class StopAfter:
    def __init__(self, steps):
        self.left = steps
    def __call__(self):
        if self.left is not None:
            self.left -= 1
        return self.left == 0

outcomes = []
for path, steps in json.loads(sys.argv[1]):
    try:
        train_student(TrainJob.model_validate_json(open(path).read()), should_stop=StopAfter(steps))
        outcomes.append("done")
    except TrainingStoppedError as stopped:
        outcomes.append(f"stopped after {stopped.step}")
    except StudentError as error:
        outcomes.append(str(error))
if os.environ["RANK"] == "0":
    print("OUTCOMES", json.dumps(outcomes), flush=True)
import torch
torch.distributed.barrier()
os._exit(0)  # taking gloo's threads down now and then aborts; that is not tested here
"""


class Run(NamedTuple):
    """A job and after how many of its steps it is asked to stop."""

    job: Path
    steps: int | None = None


def write_job(
    output: Path, labels: LabelSource, student: Path, teacher: Path, **train: object
) -> Path:
    """The file of a short training, with changes to its settings."""
    settings: dict[str, object] = {
        "model": str(student),
        "loss": TAID,
        "optimizer": OptimizerConfig(lr=1e-3),
        "batch": BatchConfig(tokens=60, micro_tokens=40),
        "dtype": "float32",
        "epochs": 2,
        "checkpoint": {"every_steps": 2},
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


def launcher(world_size: int) -> list[str]:
    if world_size == 1:
        return [sys.executable]
    return [
        *[sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)],
        *["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"],
    ]


def train(job: Path, *, world_size: int = 1) -> list[dict[str, float]]:
    """Run a job as a user does; returns its metrics."""
    done = subprocess.run(
        [*launcher(world_size), "-m", "student_train", str(job)],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(job)


def train_all(
    folder: Path, runs: Sequence[Run], *, world_size: int, timeout_s: float = 550
) -> list[str]:
    """Run trainings one after the other in one group of processes; returns how each ended."""
    script = folder / f"trainings-{len(list(folder.iterdir()))}.py"
    script.write_text(ONE_AFTER_THE_OTHER)
    arguments = json.dumps([[str(run.job), run.steps] for run in runs])
    done = subprocess.run(
        [*launcher(world_size), str(script), arguments],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if "OUTCOMES " in line]
    assert lines, done.stderr[-3000:]
    outcomes: list[str] = json.loads(lines[0].partition("OUTCOMES ")[2])
    return outcomes


def start(job: Path, *, world_size: int = 1) -> subprocess.Popen[str]:
    """Start a job in a process group of its own."""
    return subprocess.Popen(
        [*launcher(world_size), "-m", "student_train", str(job)],
        env=environment(),
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], job: Path, step: int) -> None:
    """Return as soon as a step is in the log."""
    deadline = time.monotonic() + 120
    while len(read_metrics(job)) < step:
        assert process.poll() is None, "the training ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill the launcher and all ranks at once."""
    launcher = psutil.Process(process.pid)
    # torchrun gives every rank a session of its own
    for each in (launcher, *launcher.children(recursive=True)):
        each.kill()
    process.communicate()


def read_metrics(job: Path) -> list[dict[str, float]]:
    """What is in the log; a line that is being written is left out."""
    log = job.parent / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(job: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(job)]


def course_of_t(job: Path) -> list[float]:
    return [line["t"] for line in read_metrics(job)]
