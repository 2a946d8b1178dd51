"""What a check says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from student_train.errors import PreflightError

Verdict = Literal["ok", "warning", "refused", "unknown"]
"""``unknown``: it cannot be told yet, or not here."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, in one sentence."""

    check: str
    """Name of the check, such as ``chat template``."""
    verdict: Verdict
    sentence: str
    """What was found; with a way out unless it is in order."""


def require_fit(findings: Sequence[Finding]) -> None:
    """Refuse a training that a check refuses.

    Raises:
        PreflightError: with the sentences of all checks that refuse.
    """
    refused = [finding.sentence for finding in findings if finding.verdict == "refused"]
    if len(refused) == 1:
        raise PreflightError(refused[0])
    if refused:
        listed = "\n  ".join(refused)
        raise PreflightError(f"student and labels do not fit in {len(refused)} ways:\n  {listed}")
