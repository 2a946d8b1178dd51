"""Shares of the machine; Ray itself is not started here."""

from typing import Any

import pytest

from pipeline.cluster import Cluster, unwrapped
from pipeline.config import ClusterConfig
from storage.errors import ConfigError, DistillError


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Cluster(ClusterConfig(cpus=4, student_workers=2))


def test_trainers_share_the_cpus_evenly(cluster: Cluster) -> None:
    assert cluster.student_threads == 2


def test_more_threads_than_cpus_are_refused_instead_of_waiting_for_ever(cluster: Cluster) -> None:
    cluster.require_cpus(2, 2, "a and b")
    with pytest.raises(ConfigError, match=r"a and b ask for 2 x 3 CPUs, this machine gives 4"):
        cluster.require_cpus(2, 3, "a and b")


def test_memory_shares_follow_the_threads_and_never_exceed_the_whole(cluster: Cluster) -> None:
    whole = cluster.memory_bytes(4)
    assert cluster.memory_bytes(1) * 4 <= whole
    assert cluster.options(threads=1)["memory"] == cluster.memory_bytes(1)


def test_a_cluster_that_is_joined_reserves_no_memory_of_this_machine() -> None:
    joined = Cluster(ClusterConfig(address="auto"))
    assert "memory" not in joined.options(threads=1)
    joined.require_cpus(100, 8, "more than this machine has")


def test_nothing_is_started_before_it_is_needed(cluster: Cluster) -> None:
    with cluster:
        assert not cluster.started


class Nodes:
    """Ray as far as it is asked for its machines."""

    def __init__(self, *resources: dict[str, float]) -> None:
        self._resources = resources

    def nodes(self) -> list[dict[str, Any]]:
        lost = {"Alive": False, "Resources": {"CPU": 1000.0, "GPU": 1000.0}}
        return [lost, *({"Alive": True, "Resources": r} for r in self._resources)]


def joined(config: dict[str, Any], *resources: dict[str, float]) -> Cluster:
    cluster = Cluster(ClusterConfig(address="auto", **config))
    cluster._ray = Nodes(*resources)
    return cluster


@pytest.mark.parametrize(
    ("config", "resources", "fit"),
    [
        ({"student_threads": 4}, [{"CPU": 16}, {"CPU": 7}], 5),
        ({"student_threads": 4, "student_workers": 2}, [{"CPU": 16}, {"CPU": 7}], 2),
        ({"student_threads": 4, "gpus_per_worker": 1}, [{"CPU": 64, "GPU": 8}, {"CPU": 64}], 8),
        ({"student_threads": 4, "gpus_per_worker": 0.5}, [{"CPU": 64, "GPU": 2}], 4),
        ({"student_threads": 32}, [{"CPU": 16}], 1),  # Ray waits for a larger machine
        ({"student_threads": 4, "students_at_once": 3}, [{"CPU": 64}], 3),
        ({"student_threads": 1, "student_workers": {"max": 4}}, [{"CPU": 64}], 1),
    ],
)
def test_as_many_students_at_once_as_the_machines_hold(
    config: dict[str, Any], resources: list[dict[str, float]], fit: int
) -> None:
    cluster = joined(config, *resources)
    assert cluster.students_at_once(100) == fit
    assert cluster.students_at_once(1) == 1


def test_students_at_once_never_oversubscribe_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(ClusterConfig(cpus=4, student_threads=2, students_at_once=3))
    assert cluster.students_at_once(2) == 2
    with pytest.raises(ConfigError, match=r"students_at_once ask for 3 x 2 CPUs"):
        cluster.students_at_once(6)


@pytest.mark.parametrize(
    ("workers", "bounds"), [(3, (3, 3)), ({"max": 4}, (1, 4)), ({"min": 2, "max": 2}, (2, 2))]
)
def test_workers_are_a_number_or_a_range(workers: object, bounds: tuple[int, int]) -> None:
    config = ClusterConfig.model_validate({"student_workers": workers})
    assert config.worker_bounds == bounds
    assert config.is_elastic == (bounds[0] < bounds[1])


def test_several_elastic_students_are_refused() -> None:
    with pytest.raises(ValueError, match="would each reckon with the whole cluster"):
        ClusterConfig.model_validate({"student_workers": {"max": 4}, "students_at_once": 2})


def test_an_error_that_came_through_ray_is_the_one_that_was_raised() -> None:
    class CopyOfRayError(DistillError):
        """Ray's error of a task is a subclass of what was raised, and prints its traceback."""

        cause: BaseException

    raised = ConfigError("one sentence")
    copy = CopyOfRayError("Traceback ...")
    copy.cause = raised
    outer = RuntimeError("the step failed")
    outer.__cause__ = copy
    assert unwrapped(outer) is raised
    assert unwrapped(copy) is raised
    assert unwrapped(raised) is raised
    other = RuntimeError("a bug")
    assert unwrapped(other) is other
