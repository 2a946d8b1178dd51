"""``python -m student_train JOB.json``: train one student without Ray (also under torchrun)."""

import sys
from pathlib import Path

from storage.certificate import require_fit_samples
from storage.errors import DistillError
from storage.selection import load_selection
from storage.store import LabelStore
from student_train.config import LabelSource, TrainJob


def main() -> int:
    """Run one job; 0 done, 2 a problem the user can fix."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m student_train JOB.json\n")
        return 2
    try:
        job = TrainJob.model_validate_json(Path(sys.argv[1]).read_text())
        _require_fit(job.labels)
        from student_train.trainer import train_student

        train_student(job)
    except DistillError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _require_fit(source: LabelSource) -> None:
    """Refuse labels that are known to be wrong, as the pipeline does before it writes a job."""
    store = LabelStore(source.store)
    spec = store.open(source.label_set).spec
    selection = load_selection(store.objects, source.selection)
    require_fit_samples(store.view(spec), selection.sample_keys)


if __name__ == "__main__":
    sys.exit(main())
