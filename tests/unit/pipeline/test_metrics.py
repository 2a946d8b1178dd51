"""Numbers for Prometheus; Ray itself is a stand-in that remembers what it was told."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline.metrics import METRICS, PREFIX, Metrics

DOCUMENT = Path(__file__).parents[3] / "docs" / "cluster.md"


class Recorder:
    """A metric of Ray."""

    told: list[tuple[str, float, dict[str, str]]] = []  # noqa: RUF012 - cleared by the fixture

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.keys = name, set(tag_keys)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == self.keys
        self.told.append((self.name, value, tags))

    set = inc


class FakeRay(ModuleType):
    running = True

    def is_initialized(self) -> bool:
        return self.running


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray, util, metrics = FakeRay("ray"), ModuleType("ray.util"), ModuleType("ray.util.metrics")
    parts: Any = metrics
    parts.Counter = parts.Gauge = Recorder
    util.metrics = metrics  # type: ignore[attr-defined]
    for module in (ray, util, metrics):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    Recorder.told = []
    return ray


def test_numbers_carry_project_run_and_their_own_labels(ray: FakeRay) -> None:
    metrics = Metrics("tiny", "r1")
    metrics.add("samples_labelled_total", 4)
    metrics.add("samples_labelled_total", 2)
    metrics.set("training_loss", 1.5, student="hard")
    of = {"project": "tiny", "run": "r1"}
    assert Recorder.told == [
        ("distillcache_samples_labelled_total", 4, of),
        ("distillcache_samples_labelled_total", 2, of),
        ("distillcache_training_loss", 1.5, {**of, "student": "hard"}),
    ]


def test_what_comes_before_ray_runs_is_told_when_it_does(ray: FakeRay) -> None:
    ray.running = False
    metrics = Metrics("tiny", "r1")
    metrics.add("samples_cached_total", 30)
    metrics.add("samples_cached_total", 0)
    assert Recorder.told == []
    ray.running = True
    metrics.set("engines", 2)
    assert [(name, value) for name, value, _ in Recorder.told] == [
        ("distillcache_samples_cached_total", 30),
        ("distillcache_engines", 2),
    ]


@pytest.mark.parametrize(
    ("name", "labels"), [("engines", {}), ("samples_labelled_total", {"student": "a"})]
)
def test_a_counter_is_no_gauge_and_labels_are_checked(name: str, labels: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=name):
        Metrics("tiny", "r1").add(name, 1, **labels)


def test_names_follow_the_rules_of_prometheus_and_stand_in_the_document() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"[a-z][a-z_]*", name)
        assert name.endswith("_total") == (metric.kind == "counter")
    documented = set(re.findall(rf"`ray_{PREFIX}(\w+)`", DOCUMENT.read_text()))
    assert documented == set(METRICS)
