"""Which of the evaluated students is the best, and when to stop looking for a better one.

Both are functions of the evaluations so far, which are in ``heldout.jsonl``: there is no other
state, so a resumed training decides as one that was never interrupted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from student_train.config import TrainConfig
from student_train.watching.config import HIGHER_IS_BETTER, TEACHER_FORCED_KL, EarlyStopConfig

Evaluations = Sequence[Mapping[str, Any]]
"""Lines of ``heldout.jsonl``: ``step`` and the metrics, in the order of the steps."""

FAVOURS_SOFT_LABELS = (
    "{metric} on the teacher's own tokens favours soft labels: it does not see what a student "
    "makes of its own mistakes, where hard labels help (The Bridge-Garden Dilemma, ICML 2026); "
    "compare students by their own answers before you choose between them by it"
)
"""Warning wherever a teacher-forced KL decides."""


def selection_warning(train: TrainConfig) -> str | None:
    """What to know about the metric that decides; None where nothing or another one does."""
    deciding = [section.metric for section in (train.best, train.early_stop) if section is not None]
    found = [metric for metric in deciding if metric in TEACHER_FORCED_KL]
    return FAVOURS_SOFT_LABELS.format(metric=found[0]) if found else None


def best_step(evaluations: Evaluations, metric: str) -> int | None:
    """Step of the best evaluation, the first of equal ones; None before the first."""
    if not evaluations:
        return None
    best = min(evaluations, key=lambda line: _loss(line, metric))
    return int(best["step"])


def should_stop(evaluations: Evaluations, settings: EarlyStopConfig) -> bool:
    """Whether ``patience`` evaluations in a row were no improvement on the best before them."""
    best = float("inf")
    in_vain = 0
    for line in evaluations:
        loss = _loss(line, settings.metric)
        improved = loss < best - settings.min_delta or best == float("inf")
        best = loss if improved else best
        in_vain = 0 if improved else in_vain + 1
    return in_vain >= settings.patience


def _loss(line: Mapping[str, Any], metric: str) -> float:
    """The metric, turned so that less is better."""
    value = float(line[metric])
    return -value if metric in HIGHER_IS_BETTER else value
