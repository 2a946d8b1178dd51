"""Shares of the machine; Ray itself is not started here."""

import pytest

from pipeline.cluster import Cluster
from pipeline.config import ClusterConfig
from storage.errors import ConfigError


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
