"""The checks and the self-test of one job, as ``python -m student_train`` prints them."""

import sys

from student_train.config import TrainJob
from student_train.preflight.checks import check_job
from student_train.preflight.findings import require_fit
from student_train.preflight.self_test import self_test
from student_train.streaming.reader import LabelReader


def print_preflight(job: TrainJob) -> None:
    """Check a job and print one line per check.

    Raises:
        PreflightError: for what does not fit.
        NotLabelledError: if labels are missing.
    """
    train = job.train
    reader = LabelReader(
        job.labels, train.loss.weight, mixture=job.mixture, data=train.data, loader=train.loader
    )
    findings = check_job(job, reader)
    for finding in findings:
        sys.stdout.write(f"{finding.verdict:8} {finding.check}: {finding.sentence}\n")
    require_fit(findings)


def print_self_test(job: TrainJob) -> None:
    """Take the teacher as its own student and print one line per divergence.

    Raises:
        PreflightError: if one is not near 0.
        NotLabelledError: if labels are missing.
    """
    tested = self_test(job)
    sys.stdout.write(
        f"the teacher as its own student: {tested.num_samples} samples, {tested.num_rows} tokens, "
        f"{tested.dtype}\n"
    )
    for found in tested.measured:
        verdict = "ok" if found.passed else "failed"
        sys.stdout.write(
            f"{verdict:8} {found.name}: {found.value:.2e} nats (at most {found.tolerance:g})\n"
        )
    own, stored = tested.cross_entropy, tested.teacher_cross_entropy
    sys.stdout.write(f"cross-entropy {own:.4f} nats, stored {stored:.4f}\n")
    tested.require_passed()
