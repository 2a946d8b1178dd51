"""``python -m student_train JOB.json``: train one student without Ray (also under torchrun)."""

import sys
from pathlib import Path

from storage.errors import DistillError
from student_train.config import TrainJob
from student_train.label_sources import require_fit_labels


def main() -> int:
    """Run one job; 0 done, 2 a problem the user can fix."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m student_train JOB.json\n")
        return 2
    try:
        job = TrainJob.model_validate_json(Path(sys.argv[1]).read_text())
        require_fit_labels((job.labels, *job.mixture))
        from student_train.trainer import train_student

        train_student(job)
    except DistillError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
