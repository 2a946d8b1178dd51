"""What looks at a training while it runs: logs, trackers, progress, held-out evaluation.

Nothing here changes a step. What can change is when the training ends, and which student is
exported, where the settings ask for that.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from student_train.config import GENERATIONS_FILE, HELDOUT_FILE, METRICS_FILE, TrainJob
from student_train.engine import gather_over_ranks, world
from student_train.watching.best import BestStudent, Export, write_selection
from student_train.watching.heldout import HeldoutEvaluation, HeldoutResult
from student_train.watching.progress import StepProgress
from student_train.watching.step_choice import best_step, selection_warning, should_stop
from student_train.watching.step_log import StepLog
from student_train.watching.trackers.base import TrackedRun, Trackers

NOT_TRACKED = frozenset({"step", "total_steps"})
"""Entries of a line that are no measurements."""


class Watch:
    """Everything that looks at one training; a context manager that every rank enters.

    Args:
        job: The training.
        engine: DeepSpeed's.
        language_model: Of the student.
        export: Writes the student of now, for ``train.best``.
        finished_steps: Steps that the loaded checkpoint contains.
        total_steps: Of the whole training.
        progress: Whether rank 0 shows how far the training is.
    """

    def __init__(
        self,
        job: TrainJob,
        *,
        engine: Any,
        language_model: Any,
        export: Export,
        finished_steps: int,
        total_steps: int,
        progress: bool,
    ) -> None:
        self._train, self._output, self._total_steps = job.train, Path(job.output), total_steps
        self._main = _MainRank(job, finished_steps, progress) if world()[0] == 0 else None
        evaluations = [] if self._main is None else self._main.heldout.lines()
        self._evaluations: list[dict[str, Any]] = gather_over_ranks(evaluations)[0]
        self._candidates: list[dict[str, Any]] = []
        self._best = None
        if job.train.best is not None:
            writes = self._main is not None
            self._best = BestStudent(job, export, writes=writes, finished_steps=finished_steps)
            if self._best.restore(best_step(self._evaluations, job.train.best.metric)):
                self._candidates = self._evaluations.copy()
        self._evaluate = None
        if job.train.heldout.every_steps is not None:
            self._evaluate = HeldoutEvaluation(job, engine=engine, language_model=language_model)
        self._warning = selection_warning(job.train)
        if self._warning is not None and self._main is not None:
            sys.stderr.write(f"warning: {self._warning}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._main is not None:
            self._main.close()

    @property
    def stops(self) -> bool:
        """Whether the training ends here, by ``train.early_stop``."""
        settings = self._train.early_stop
        return settings is not None and should_stop(self._evaluations, settings)

    @property
    def facts(self) -> dict[str, str]:
        """For the model card."""
        return {} if self._warning is None else {"warning": self._warning}

    @property
    def held_out(self) -> dict[str, float]:
        """Metrics of the last evaluation; empty where there was none."""
        if not self._evaluations:
            return {}
        last = self._evaluations[-1]
        return {name: last[name] for name in last if name not in ("step", "num_tokens", "seconds")}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Note a step, and measure the student where that is due."""
        if self._main is not None:
            self._main.note_step(metrics)
        done, every = int(metrics["step"]), self._train.heldout.every_steps
        if self._evaluate is None or every is None:
            return
        if done % every == 0 or done == self._total_steps:
            started = time.perf_counter()
            result = self._evaluate()
            self._after_evaluation(done, result, time.perf_counter() - started)

    def after_checkpoint(self) -> None:
        """A resume will not go further back than to here."""
        if self._best is not None:
            self._best.checkpointed()

    def publish_best(self, finished_steps: int) -> bool:
        """Put the best student where the exported one belongs; False where the last one does."""
        chosen = None
        if self._best is not None and self._train.best is not None:
            chosen = best_step(self._candidates, self._train.best.metric)
            self._best.publish()
        if self._main is not None and self._train.heldout_decides:
            self._write_selection(finished_steps, chosen)
        return chosen is not None

    def _after_evaluation(self, done: int, result: HeldoutResult, seconds: float) -> None:
        line = {"step": done, **result.metrics, "num_tokens": result.num_tokens, "seconds": seconds}
        self._evaluations.append(line)
        self._candidates.append(line)
        if self._main is not None:
            self._main.note_evaluation(line, result)
        if self._best is None or self._train.best is None:
            return
        metric = self._train.best.metric
        if best_step(self._candidates, metric) == done:
            value = f"best {metric} on held-out labels, {result.metrics[metric]:.6g}"
            facts = {"exported step": f"{done} of {self._total_steps}: {value}", **self.facts}
            self._best.keep(done, facts, result.metrics)

    def _write_selection(self, finished_steps: int, chosen: int | None) -> None:
        exported = finished_steps if chosen is None else chosen
        metrics = next((line for line in self._evaluations if line["step"] == exported), {})
        selection = {
            "exported_step": exported,
            "finished_steps": finished_steps,
            "total_steps": self._total_steps,
            "best": self._train.best and self._train.best.model_dump(),
            "early_stop": self._train.early_stop and self._train.early_stop.model_dump(),
            "heldout": dict(metrics),
            "warning": self._warning,
        }
        write_selection(self._output, selection)


class _MainRank:
    """Files, trackers and progress: what rank 0 alone has."""

    def __init__(self, job: TrainJob, finished_steps: int, progress: bool) -> None:
        output = Path(job.output)
        self._metrics = StepLog(output / METRICS_FILE, finished_steps)
        self.heldout = StepLog(output / HELDOUT_FILE, finished_steps)
        self._generations = StepLog(output / GENERATIONS_FILE, finished_steps)
        labels = {"labels": job.labels.model_dump(mode="json"), "model": job.model}
        run = TrackedRun(
            directory=output,
            name=job.card.get("student", output.name),
            settings={**job.train.model_dump(mode="json"), **labels},
            finished_steps=finished_steps,
        )
        self._trackers = Trackers(("tensorboard", *job.train.watch.trackers), run)
        self._progress = StepProgress() if progress else None

    def note_step(self, metrics: Mapping[str, float]) -> None:
        """One line of metrics."""
        self._metrics.add(metrics)
        self._trackers.scalars(int(metrics["step"]), _named("train", metrics))
        if self._progress is not None:
            self._progress.show(metrics)

    def note_evaluation(self, line: Mapping[str, Any], result: HeldoutResult) -> None:
        """One evaluation."""
        step = int(line["step"])
        self.heldout.add(line)
        self._trackers.scalars(step, _named("heldout", line))
        if result.generations:
            self._generations.add({"step": step, "samples": result.generations})
            self._trackers.texts(step, {"heldout/generations": _as_markdown(result.generations)})
        if self._progress is not None:
            values = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            self._progress.say(f"step {step}, held out: {values}")

    def close(self) -> None:
        """End trackers and progress."""
        self._trackers.close()
        if self._progress is not None:
            self._progress.close()


def _named(group: str, values: Mapping[str, float]) -> dict[str, float]:
    """Measurements by the names that trackers show them under."""
    return {
        f"{group}/{name}": float(value) for name, value in values.items() if name not in NOT_TRACKED
    }


def _as_markdown(generations: list[dict[str, str]]) -> str:
    """Prompts with both answers."""
    return "\n\n".join(
        f"**{found['sample_key']}**\n\n"
        + "\n\n".join(
            f"{who}:\n\n{_indented(found[who])}" for who in ("prompt", "teacher", "student")
        )
        for found in generations
    )


def _indented(text: str) -> str:
    """A code block, whatever the text holds."""
    return "\n".join(f"    {line}" for line in text.splitlines())
