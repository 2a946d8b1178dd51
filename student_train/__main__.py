"""``python -m student_train JOB.json``: train one student without Ray (also under torchrun).

With ``--preflight`` or ``--self-test`` nothing is trained: the checks before the first step are
printed, or the loss of the teacher as its own student.
"""

import signal
import sys
from pathlib import Path

from storage.errors import DistillError
from student_train.config import TrainJob
from student_train.errors import TrainingStoppedError
from student_train.streaming.label_sources import require_fit_labels

STOPPED = 128 + signal.SIGTERM
"""Exit code of a process that SIGTERM ended, as a shell tells it."""


def main() -> int:
    """Run one job; 0 done, 2 a problem the user can fix, 143 stopped by SIGTERM and resumable."""
    mode = sys.argv[2] if len(sys.argv) == 3 else None
    if len(sys.argv) not in (2, 3) or mode not in (None, "--preflight", "--self-test"):
        sys.stderr.write("usage: python -m student_train JOB.json [--preflight | --self-test]\n")
        return 2
    try:
        job = TrainJob.model_validate_json(Path(sys.argv[1]).read_text())
        require_fit_labels((job.labels, *job.mixture))
        if mode is not None:
            from student_train.preflight.command import print_preflight, print_self_test

            (print_preflight if mode == "--preflight" else print_self_test)(job)
            return 0
        from student_train.trainer import train_student

        train_student(job, progress=True)
    except TrainingStoppedError as stopped:
        sys.stderr.write(f"{stopped}\n")
        return STOPPED
    except DistillError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
