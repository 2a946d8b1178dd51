"""The checks as a rank of a training makes them."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from storage.files import write_atomically
from student_train.config import TrainJob
from student_train.engine import gather_over_ranks
from student_train.preflight.checks import check_job
from student_train.preflight.findings import Finding, require_fit
from student_train.streaming.reader import LabelReader

PREFLIGHT_FILE = "preflight.json"
"""What the checks said, in the output directory of a training."""


def require_fit_job(job: TrainJob, reader: LabelReader) -> None:
    """Check a job before its first step; what another rank refuses is refused here too.

    Rank 0 leaves the findings in ``preflight.json`` and says warnings on stderr.

    Raises:
        PreflightError: with one sentence for everything that does not fit.
    """
    findings = _with_those_of_other_ranks(check_job(job, reader))
    if os.environ.get("RANK", "0") == "0":
        document = json.dumps([asdict(finding) for finding in findings], indent=1)
        write_atomically(Path(job.output) / PREFLIGHT_FILE, document.encode())
        for finding in findings:
            if finding.verdict == "warning":
                sys.stderr.write(f"warning: {finding.check}: {finding.sentence}\n")
    require_fit(findings)


def _with_those_of_other_ranks(findings: list[Finding]) -> list[Finding]:
    """These, and what only other ranks refuse, such as a host with less memory.

    Where the process group is made later, or needs a device, a rank that refuses ends by itself,
    and the launcher ends the others.
    """
    group = torch.distributed
    if not group.is_initialized() or group.get_backend() != "gloo":
        return findings
    refused_here = {finding.check for finding in findings if finding.verdict == "refused"}
    refused_elsewhere = [
        finding
        for theirs in gather_over_ranks(findings)
        for finding in theirs
        if finding.verdict == "refused" and finding.check not in refused_here
    ]
    return [*findings, *dict.fromkeys(refused_elsewhere)]
