"""Weights & Biases. Set up by its own variables: ``WANDB_API_KEY``, ``WANDB_MODE=offline``, ..."""

import importlib
import uuid
from collections.abc import Mapping
from typing import Any

from student_train.watching.trackers.base import TrackedRun
from student_train.watching.trackers.run_ids import store_id, stored_id

PROJECT = "distillcache"
"""Project of the runs unless ``WANDB_PROJECT`` names another one."""


class WeightsAndBiases:
    """A run of Weights & Biases; a resumed training goes on with the same one.

    The service ignores steps that it has had.

    Args:
        run: The training.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        known = stored_id(run.directory, "wandb")
        run_id = known or uuid.uuid4().hex[:12]
        settings = self._wandb.setup().settings
        self._run = self._wandb.init(
            project=settings.project or PROJECT,
            name=run.name,
            id=run_id,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.settings),
        )
        if known is None:
            store_id(run.directory, "wandb", run_id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`student_train.watching.trackers.base.Tracker`."""
        self._run.log(dict(values), step=step)

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """See :class:`student_train.watching.trackers.base.Tracker`."""
        html = {name: self._wandb.Html(f"<pre>{_escaped(v)}</pre>") for name, v in values.items()}
        self._run.log(html, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
