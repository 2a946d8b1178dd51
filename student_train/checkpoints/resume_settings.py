"""What a training must have in common with the checkpoint that it goes on from."""

import json
from pathlib import Path
from typing import Any

from storage.fingerprint import DigestMemo, fingerprint_model
from storage.keys import key_of
from student_train.checkpoints.manifest import flattened
from student_train.config import TrainJob

MAY_CHANGE = frozenset({"train.batch.micro_tokens", "train.chat_template", "train.export_dtype"})
"""Settings that enter a student's key and that a resume may change all the same: they act on
rounding or on the export only. Settings outside the key may change anyway."""


def resume_settings(job: TrainJob, plan_digest: str, memo: DigestMemo) -> dict[str, Any]:
    """All that must be equal, by the names of its fields, as plain values.

    Labels count by what they are, not by the place of their store.

    Args:
        job: The training.
        plan_digest: Of all its steps. A response that was lost and labelled again has another
            length, and can so change them where nothing else has changed.
        memo: Remembers the digests of the untrained weights.
    """
    settings = flattened(job.train.deciding(), "train")
    settings = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
    for number, source in enumerate((job.labels, *job.mixture)):
        name = "labels" if number == 0 else f"mixture[{number - 1}]"
        settings |= flattened(source.model_dump(mode="json", exclude={"store"}), name)
    if job.train.heldout_decides and job.heldout is not None:
        settings |= flattened(job.heldout.model_dump(mode="json", exclude={"store"}), "heldout")
    settings["model"] = key_of(fingerprint_model(Path(job.model), memo))
    settings["steps"] = plan_digest
    # as it comes back from a file
    return dict(json.loads(json.dumps(settings)))
