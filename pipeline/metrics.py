"""Numbers of a run for Prometheus, through Ray: every node of the cluster serves its own.

Ray puts ``ray_`` before each name. Nothing is collected before Ray runs: a run that finds
everything published starts no Ray and has nothing to show but its events.
"""

import sys
import threading
from typing import Any, Literal

from pydantic import Field

from storage.config import Config

PREFIX = "distillcache_"


class Metric(Config):
    """One number of a run."""

    kind: Literal["counter", "gauge"]
    """A counter only grows and begins at 0 with every process; a gauge is the last value."""
    meaning: str
    """With its unit."""
    labels: tuple[str, ...] = Field(default=())
    """What tells its series apart, beside ``project`` and ``run``."""


METRICS = {
    "samples_labelled_total": Metric(kind="counter", meaning="samples that a teacher labelled"),
    "samples_cached_total": Metric(
        kind="counter", meaning="wanted samples whose labels were there already"
    ),
    "samples_quarantined_total": Metric(kind="counter", meaning="samples that were set aside"),
    "teacher_forward_tokens_total": Metric(
        kind="counter", meaning="tokens that went through a teacher, prompts included"
    ),
    "response_tokens_total": Metric(kind="counter", meaning="tokens that teachers answered"),
    "teacher_failures_total": Metric(
        kind="counter", meaning="engines that died, hung or refused", labels=("reason",)
    ),
    "engines": Metric(kind="gauge", meaning="engines that are at work"),
    "training_step": Metric(
        kind="gauge", meaning="optimiser steps that are done", labels=("student",)
    ),
    "training_total_steps": Metric(
        kind="gauge", meaning="optimiser steps of the whole training", labels=("student",)
    ),
    "training_loss": Metric(
        kind="gauge", meaning="what training minimises, nats per token", labels=("student",)
    ),
    "training_tokens_per_second": Metric(
        kind="gauge", meaning="tokens of the last step by its seconds", labels=("student",)
    ),
    "training_data_wait_share": Metric(
        kind="gauge", meaning="share of the last step spent waiting for labels", labels=("student",)
    ),
    "training_deaths_total": Metric(
        kind="counter", meaning="trainings whose processes died or raised", labels=("student",)
    ),
    "step_seconds": Metric(
        kind="gauge", meaning="wall time of the last such step that ended", labels=("step",)
    ),
    "step_failures_total": Metric(
        kind="counter", meaning="steps that did not end well", labels=("step",)
    ),
}
"""By name, without ``PREFIX``."""


class Metrics:
    """Sets the numbers of one run, from any of its processes.

    Args:
        project: Name of the project.
        run: Id of the run.
    """

    def __init__(self, project: str, run: str) -> None:
        self._tags = {"project": project, "run": run}
        self._exported: dict[str, Any] = {}
        self._waiting: list[tuple[str, float, dict[str, str]]] = []
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Raise a counter; what comes before Ray runs is kept until it does."""
        self._take(name, "counter", amount, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._take(name, "gauge", value, labels)

    def _take(self, name: str, kind: str, value: float, labels: dict[str, str]) -> None:
        metric = METRICS[name]
        if (metric.kind, set(metric.labels)) != (kind, set(labels)):
            raise ValueError(f"{name} is a {metric.kind} with the labels {metric.labels}")
        if kind == "counter" and value <= 0:
            return  # Ray refuses to add nothing
        ray = sys.modules.get("ray")
        with self._lock:
            self._waiting.append((name, value, labels))
            if ray is None or not ray.is_initialized():
                return
            for told, amount, of in self._waiting:
                exported = self._export(told)
                raised = METRICS[told].kind == "counter"
                (exported.inc if raised else exported.set)(amount, tags={**self._tags, **of})
            self._waiting.clear()

    def _export(self, name: str) -> Any:
        if name not in self._exported:
            from ray.util import metrics

            metric = METRICS[name]
            kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
            self._exported[name] = kind(
                PREFIX + name,
                description=metric.meaning,
                tag_keys=(*self._tags, *metric.labels),
            )
        return self._exported[name]
