"""What a report is made from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.steps.evaluate import UNTRAINED, Evaluation
from pipeline.steps.plan import Plan
from student_train.config import HELDOUT_FILE, METRICS_FILE

CURVE = ("step", "loss", "soft", "hard")


@dataclass(frozen=True, slots=True)
class StudentFolder:
    """A student of the project, trained or not."""

    name: str
    directory: Path
    result: dict[str, Any] | None
    """Content of ``student.json``; None while it is not published."""

    def facts(self) -> dict[str, Any]:
        """What the report says of it, its loss curve included."""
        metrics = _metrics(self.directory / METRICS_FILE)
        so_far = {
            "name": self.name,
            "steps": len(metrics),
            "trained_tokens": sum(m["tokens"] for m in metrics),
            "teacher_forward_tokens": 0,
        }
        return {
            **(so_far if self.result is None else self.result),
            "published": self.result is not None,
            "directory": str(self.directory),
            "curve": [{name: m[name] for name in CURVE} for m in metrics],
            "heldout_curve": _metrics(self.directory / HELDOUT_FILE),
        }


@dataclass(frozen=True, slots=True)
class Found:
    """Everything that is known of a run."""

    plan: Plan | None
    """None if nothing was planned yet, or the store cannot be read."""
    tokenizer: Path | None
    """Directory of the teacher's tokenizer, None if it is not on this machine."""
    students: Sequence[StudentFolder]
    evaluations: Sequence[Evaluation]
    go_on: str
    """Command line that does what is missing."""
    live: bool = False
    """Whether another process is working in the run folder."""
    missing: dict[str, str] = field(default_factory=dict)
    """By part of the report, why it cannot be made."""

    @property
    def trained(self) -> list[StudentFolder]:
        """Students that are published."""
        return [student for student in self.students if student.result is not None]

    def baseline(self, student: StudentFolder) -> Evaluation | None:
        """The evaluation of the model that a student started from."""
        untrained = [e for e in self.evaluations if e.name.startswith(UNTRAINED)]
        if len(untrained) == 1:
            return untrained[0]
        key = (student.result or {}).get("untrained", "")
        names = {e.name: e for e in untrained}
        return names.get(f"{UNTRAINED}-{key[:8]}") if key else None


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The steps that a training noted; a line that is being written is left out."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().split("\n") if line.endswith("}")]
