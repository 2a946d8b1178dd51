"""Evaluation in the middle of a training; it leaves no trace in the steps that follow.

Nothing that moves with the steps is touched: TAID's t learns from training batches only, the
position in the data is that of another stream, dropout is off, decoding is greedy, and the state of
the random numbers is put back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from transformers import AutoTokenizer

from student_train.config import TrainJob
from student_train.engine import sum_over_ranks, world
from student_train.errors import PreflightError
from student_train.evaluate import generate, measure
from student_train.streaming.reader import LabelReader
from student_train.streaming.step_plan import split_by_padded_size
from student_train.watching.config import HeldoutMetric

METRICS: tuple[str, ...] = get_args(HeldoutMetric)


@dataclass(frozen=True, slots=True)
class HeldoutResult:
    """One evaluation; the same on all ranks."""

    metrics: dict[str, float]
    """Means over all labelled positions."""
    num_tokens: int
    """How many these were."""
    generations: list[dict[str, str]]
    """Greedy answers: ``sample_key``, ``prompt``, ``teacher``, ``student``."""


def check_heldout(job: TrainJob) -> None:
    """Refuse an evaluation without labels.

    Raises:
        PreflightError: one sentence with a way out.
    """
    if job.train.heldout.every_steps is not None and job.heldout is None:
        raise PreflightError(
            "train.heldout.every_steps is set, but the job has no held-out labels; add prompts to "
            "data.heldout or leave it out"
        )


class HeldoutEvaluation:
    """Measures the student on held-out labels; call it on every rank.

    Args:
        job: The training; it names held-out labels.
        engine: DeepSpeed's, around the student.
        language_model: Of the student.
    """

    def __init__(self, job: TrainJob, *, engine: Any, language_model: Any) -> None:
        assert job.heldout is not None
        settings = job.train.heldout
        self._engine, self._language_model = engine, language_model
        self._reader = LabelReader(job.heldout, loader=job.train.loader)
        self._packed = job.train.batch.packing != "padded"
        every = range(min(settings.samples, self._reader.num_samples))
        self._micro_batches = list(
            split_by_padded_size(every, self._reader.num_tokens, job.train.batch.micro_tokens)
        )
        self._num_tokens = int(self._reader.num_rows[list(every)].sum())
        self._answered = self._reader.read(every[: settings.generations])
        self._max_new_tokens = settings.max_new_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(job.tokenizer, local_files_only=True)

    def __call__(self) -> HeldoutResult:
        """Measure the student as it is now."""
        with torch.no_grad(), _evaluating(self._engine):
            sums = sum_over_ranks(self._sums())
            generations = generate(
                self._language_model,
                self._answered,
                tokenizer=self._tokenizer,
                max_new_tokens=self._max_new_tokens,
            )
        metrics = {name: total / self._num_tokens for name, total in sums.items()}
        return HeldoutResult(metrics, self._num_tokens, generations)

    def _sums(self) -> dict[str, float]:
        """Of this rank's micro-batches; all ranks go forward equally often."""
        rank, world_size = world()
        sums = dict.fromkeys(METRICS, 0.0)
        for first in range(0, len(self._micro_batches), world_size):
            number = first + rank
            counts = number < len(self._micro_batches)
            samples = self._reader.read(self._micro_batches[number if counts else first])
            columns = measure(
                self._engine,
                samples,
                self._reader,
                METRICS,
                device=self._engine.device,
                packed=self._packed,
            )
            for name in METRICS if counts else ():
                sums[name] += float(columns[name].sum(dtype=torch.float64))
        return sums


@contextmanager
def _evaluating(engine: Any) -> Iterator[None]:
    """A block without dropout, after which random numbers go on as if it had not been."""
    devices = [engine.device] if engine.device.type == "cuda" else []
    engine.eval()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        engine.train()
