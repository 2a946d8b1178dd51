"""Trackers: TensorBoard for real, the services against a recorder that stands in for the module."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from student_train.errors import PreflightError
from student_train.watching.trackers import TRACKERS
from student_train.watching.trackers.base import TrackedRun, Trackers, require_trackers

Calls = list[tuple[str, Any]]


def run(directory: Path, finished_steps: int = 0) -> TrackedRun:
    settings = {"optimizer": {"lr": 1e-3}}
    return TrackedRun(directory, "project/student", settings, finished_steps)


def train(directory: Path, names: tuple[str, ...], first: int, last: int) -> None:
    """Steps after ``first`` up to ``last``, with an evaluation at every second one."""
    trackers = Trackers(names, run(directory, first))
    for step in range(first + 1, last + 1):
        trackers.scalars(step, {"train/loss": 1.0 / step})
        if step % 2 == 0:
            trackers.scalars(step, {"heldout/kl": 2.0 / step})
            trackers.texts(step, {"heldout/generations": f"answer <{step}>"})
    trackers.close()


# -- TensorBoard ----------------------------------------------------------------------------------
def curve(directory: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    train(tmp_path, ("tensorboard",), 0, 4)
    expected = [(step, pytest.approx(1.0 / step)) for step in (1, 2, 3, 4)]
    assert curve(tmp_path, "train/loss") == expected
    assert curve(tmp_path, "heldout/kl") == [(2, 1.0), (4, 0.5)]


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    train(tmp_path, ("tensorboard",), 0, 5)
    train(tmp_path, ("tensorboard",), 2, 7)  # the last checkpoint was written after step 2
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in curve(tmp_path, "heldout/kl")] == [2, 4, 6]


# -- Weights & Biases -----------------------------------------------------------------------------
@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls: Calls = []

    def init(**options: Any) -> SimpleNamespace:
        calls.append(("init", options))
        return SimpleNamespace(
            log=lambda values, step: calls.append(("log", (step, values))),
            finish=lambda: calls.append(("finish", None)),
        )

    module = SimpleNamespace(
        init=init,
        setup=lambda: SimpleNamespace(settings=SimpleNamespace(project=None)),
        Html=lambda text: text,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_gets_every_step_under_one_id(tmp_path: Path, wandb: Calls) -> None:
    train(tmp_path, ("wandb",), 0, 2)
    train(tmp_path, ("wandb",), 1, 3)
    first, second = (options for name, options in wandb if name == "init")
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert first["name"] == "project/student"
    assert first["config"] == {"optimizer": {"lr": 1e-3}}
    assert first["dir"] == str(tmp_path)
    losses = [v[0] for name, v in wandb if name == "log" and "train/loss" in v[1]]
    assert losses == [1, 2, 2, 3]  # the service ignores what it has had
    texts = [v[1] for name, v in wandb if name == "log" and "heldout/generations" in v[1]]
    assert texts[0] == {"heldout/generations": "<pre>answer &lt;2></pre>"}
    assert [name for name, _ in wandb].count("finish") == 2


def test_another_folder_is_another_run(tmp_path: Path, wandb: Calls) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train(tmp_path / name, ("wandb",), 0, 1)
    first, second = (options["id"] for name, options in wandb if name == "init")
    assert first != second


# -- MLflow ---------------------------------------------------------------------------------------
class MlflowRecorder:
    """The part of ``mlflow`` that is used, with one server for all clients."""

    def __init__(self) -> None:
        self.metrics: list[tuple[str, int, float]] = []
        self.runs: list[str] = []
        self.uri = ""

    def module(self) -> Any:
        return SimpleNamespace(MlflowClient=lambda: self, set_tracking_uri=self._set)

    def _set(self, uri: str) -> None:
        self.uri = uri

    def get_experiment_by_name(self, name: str) -> None:
        assert name == "distillcache"

    def create_experiment(self, name: str, artifact_location: str) -> str:
        assert artifact_location.startswith("file://")
        return name

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.runs.append(f"{experiment}/{run_name}")
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_param(self, run_id: str, key: str, value: str) -> None:
        assert (run_id, key, value) == ("r1", "optimizer", "{'lr': 0.001}")

    def get_metric_history(self, run_id: str, name: str) -> list[Any]:
        return [SimpleNamespace(step=step) for found, step, _ in self.metrics if found == name]

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.metrics += [(metric[0], metric[3], metric[1]) for metric in metrics]

    def log_text(self, run_id: str, text: str, file: str) -> None:
        assert file.startswith("heldout/generations/step-0000000")

    def set_terminated(self, run_id: str) -> None:
        assert run_id == "r1"


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> MlflowRecorder:
    recorder = MlflowRecorder()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", recorder.module())
    entities = SimpleNamespace(Metric=lambda *values: values)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return recorder


def test_mlflow_gets_no_step_twice(tmp_path: Path, mlflow: MlflowRecorder) -> None:
    train(tmp_path, ("mlflow",), 0, 4)
    train(tmp_path, ("mlflow",), 2, 6)
    losses = [step for name, step, _ in mlflow.metrics if name == "train/loss"]
    assert losses == [1, 2, 3, 4, 5, 6]
    assert [step for name, step, _ in mlflow.metrics if name == "heldout/kl"] == [2, 4, 6]
    assert mlflow.runs == ["distillcache/project/student"]
    assert mlflow.uri == f"sqlite:///{tmp_path}/mlflow.db"


# -- what can go wrong ----------------------------------------------------------------------------
def test_a_missing_package_is_one_sentence_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", (TRACKERS["wandb"][0], "no_such_package"))
    with pytest.raises(PreflightError, match="`pip install no_such_package`"):
        require_trackers(["tensorboard", "wandb"])
    require_trackers(["tensorboard"])


class Failing:
    """Breaks at the second step."""

    def __init__(self, run: TrackedRun) -> None:
        self.steps: list[int] = []

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)
        if step == 2:
            raise ConnectionError("the service is away")

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        raise AssertionError("it was dropped before")

    def close(self) -> None:
        raise AssertionError("it was dropped before")


def test_a_tracker_that_fails_is_dropped_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TRACKERS, "failing", (f"{__name__}:Failing", "json"))
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(Failing=Failing))  # type: ignore[arg-type]
    train(tmp_path, ("failing", "tensorboard"), 0, 4)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "failing" in warnings[0]
    assert "the service is away" in warnings[0]
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [1, 2, 3, 4]


def test_a_tracker_that_cannot_begin_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("no network")

    settings = SimpleNamespace(settings=SimpleNamespace(project="p"))
    module = SimpleNamespace(init=init, setup=lambda: settings)
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    train(tmp_path, ("wandb",), 0, 2)
    assert "no network" in capsys.readouterr().err
