"""MLflow. Set up by its own variables: ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``, ..."""

import importlib
import os
import time
from collections.abc import Mapping
from typing import Any

from student_train.watching.trackers.base import TrackedRun
from student_train.watching.trackers.run_ids import store_id, stored_id

EXPERIMENT = "distillcache"
"""Experiment of the runs unless ``MLFLOW_EXPERIMENT_NAME`` names another one."""
DATABASE = "mlflow.db"
ARTIFACTS = "mlflow-artifacts"
"""Database and files of a training whose tracking URI is not set, in its output directory."""
MARK = "train/loss"
"""Metric of every step, from whose history the last step that the service has is read."""


class MLflow:
    """A run of MLflow; a resumed training goes on with the same one, and repeats no step.

    Without a tracking URI everything is in the output directory of the training.

    Args:
        run: The training.
    """

    def __init__(self, run: TrackedRun) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{(run.directory / DATABASE).absolute()}")
        self._client = mlflow.MlflowClient()
        self._metric = importlib.import_module("mlflow.entities").Metric
        known = stored_id(run.directory, "mlflow")
        self._run_id: str = known or self._create(run)
        if known is None:
            store_id(run.directory, "mlflow", self._run_id)
        history = self._client.get_metric_history(self._run_id, MARK)
        self._sent = max((metric.step for metric in history), default=0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`student_train.watching.trackers.base.Tracker`."""
        if step > self._sent:
            now_ms = int(time.time() * 1000)
            found = [self._metric(name, value, now_ms, step) for name, value in values.items()]
            self._client.log_batch(self._run_id, metrics=found)

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """See :class:`student_train.watching.trackers.base.Tracker`; a file for every step."""
        for name, value in values.items():
            self._client.log_text(self._run_id, value, f"{name}/step-{step:08d}.md")

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)

    def _new_experiment(self, name: str, run: TrackedRun) -> Any:
        if "MLFLOW_TRACKING_URI" in os.environ:
            return self._client.create_experiment(name)
        files = (run.directory / ARTIFACTS).absolute().as_uri()
        return self._client.create_experiment(name, artifact_location=files)

    def _create(self, run: TrackedRun) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._new_experiment(name, run) if found is None else found.experiment_id
        created = self._client.create_run(experiment, run_name=run.name)
        for key, value in run.settings.items():
            self._client.log_param(created.info.run_id, key, str(value)[:500])
        return str(created.info.run_id)
