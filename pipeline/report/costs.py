"""What a project paid: for its teacher once, for every student, and for measuring them."""

import datetime
from collections.abc import Sequence
from typing import Any

from pipeline.config import RunConfig

PHASES = {
    "teacher": ("label",),
    "certify": ("certify",),
    "train": ("train",),
    "evaluate": ("evaluate",),
    "prepare": ("prepare",),
}
"""Steps by what they are paid for."""


LABEL_FACTS = (
    "samples",
    "response_tokens",
    "tokens_per_second",
    "engine_seconds",
    "cost",
    "failures",
    "retried_samples",
)
"""What labelling notes beside its time."""


def cost_rows(events: Sequence[dict[str, Any]], config: RunConfig) -> list[dict[str, Any]]:
    """One row per step that ended, of all runs of a project, in order.

    A step that failed was paid for too, unless it failed before it had begun; its seconds are those
    between its events where it did not note them. One that ended without an event cost something
    that nobody knows and is left out.
    """
    rows = []
    begun: dict[str, str] = {}
    for event in events:
        if "step" not in event:
            continue
        step: str = event["step"]
        if event["event"] == "started":
            begun[step] = event["time"]
        elif event["event"] in ("finished", "failed"):
            seconds, start = event.get("seconds"), begun.pop(step, None)
            if seconds is None and start is None and event["event"] == "failed":
                continue
            if seconds is None:
                seconds = _seconds(start or event["time"], event["time"])
            what = event.get("students") or event.get("models") or [event.get("model", "")]
            devices = num_devices(config, step) * event.get("at_once", 1)
            rows.append(
                {
                    "step": step,
                    "what": ", ".join(what),
                    "state": event["event"],
                    "seconds": seconds,
                    "devices": devices,
                    "device_seconds": round(seconds * devices, 2),
                    "teacher_forward_tokens": event.get("teacher_forward_tokens", 0),
                    "trained_tokens": event.get("trained_tokens", 0),
                    **{name: event[name] for name in LABEL_FACTS if name in event},
                }
            )
    return rows


def num_devices(config: RunConfig, step: str) -> float:
    """GPUs that a step holds with these settings; where it holds none, the machine counts as one.

    Settings may have changed since the step ran: they decide no result, so nobody notes them.
    """
    cluster, backend = config.cluster, config.teacher.backend
    if step == "label" and cluster.teacher_gpus:
        return float(backend.replicas * getattr(backend, "tensor_parallel", 1))
    if step == "train" and cluster.gpus_per_worker:
        return cluster.worker_bounds[1] * cluster.gpus_per_worker
    return 1.0


def cost_summary(
    rows: Sequence[dict[str, Any]],
    students: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
    labels: dict[str, Any] | None,
) -> dict[str, Any]:
    """Costs by what they were paid for, and the teacher's cost with and without a cache.

    Args:
        rows: As :func:`cost_rows` returns them.
        students: The trained ones.
        evaluations: Of all models.
        labels: Facts of the labels, None where they are not known.
    """
    num_bytes = None if labels is None else labels["stored_bytes"]
    num_forward = None if labels is None else labels["forward_tokens"]
    tokens = {
        "teacher": sum(row["teacher_forward_tokens"] for row in rows if row["step"] == "label"),
        "train": sum(row["trained_tokens"] for row in rows),
        "evaluate": sum(evaluation["num_tokens"] for evaluation in evaluations),
    }
    phases = [
        {
            "phase": phase,
            "seconds": round(sum(row["seconds"] for row in mine), 2),
            "device_seconds": round(sum(row["device_seconds"] for row in mine), 2),
            "tokens": tokens.get(phase),
            "bytes": num_bytes if phase == "teacher" else None,
        }
        for phase, steps in PHASES.items()
        for mine in [[row for row in rows if row["step"] in steps]]
    ]
    teacher_seconds, count = phases[0]["device_seconds"], len(students)
    once = None
    if count and num_forward is not None:
        once = {
            "students": count,
            "paid_tokens": tokens["teacher"],
            "paid_device_seconds": teacher_seconds,
            "needed_tokens": num_forward,
            "separate_tokens": count * num_forward,
            "separate_device_seconds": round(count * teacher_seconds, 2),
            "in_loop_tokens": sum(student["trained_tokens"] for student in students),
        }
    return {"phases": phases, "teacher_once": once}


def _seconds(start: str, end: str) -> float:
    parsed = (datetime.datetime.fromisoformat(time) for time in (start, end))
    first, last = parsed
    return max(0.0, (last - first).total_seconds())
