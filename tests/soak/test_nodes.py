"""Machines that join and go while labels are made: several Ray nodes on this machine.

Takes about a minute on two quiet cores.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa

from tests.conftest import REPOSITORY

NUM_SAMPLES = 6000


def committed(store: Path) -> Counter[str]:
    """How often each sample key is committed."""
    keys: Counter[str] = Counter()
    for record in store.rglob("commits/*.json"):
        for shard in json.loads(record.read_bytes())["shards"]:
            path = record.parent.parent / "shards" / f"{shard['name']}.samples.arrow"
            table = pa.ipc.open_file(path.read_bytes()).read_all()
            keys.update(table.column("sample_key").to_pylist())
    return keys


def wait_for(store: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many samples are committed."""
    deadline = time.monotonic() + 300
    while len(committed(store)) < count:
        assert process.poll() is None, "".join(process.communicate())
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_node_that_joins_works_and_one_that_is_killed_costs_nothing(project_file: Path) -> None:
    """Three engines are wanted; there is room for one, then for two, then for one again."""
    from ray.cluster_utils import Cluster

    rows = [json.dumps({"prompt": f"question {n}"}) for n in range(NUM_SAMPLES)]
    (project_file.parent / "train.jsonl").write_text("\n".join(rows))
    (project_file.parent / "heldout.jsonl").write_text("")
    store = project_file.parent / "labels"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        settings = (
            'teacher.backend={"type": "fake", "replicas": 3}',
            "label.qa.enabled=false",
            "label.commit_samples=16",
        )
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pipeline", "label", str(project_file)),
                *(word for setting in settings for word in ("--set", setting)),
            ],
            cwd=REPOSITORY,
            env={**os.environ, "RAY_ADDRESS": cluster.address, "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(store, 1, process)
        node = cluster.add_node(num_cpus=1)
        events = next(project_file.parent.rglob("logs"))
        deadline = time.monotonic() + 120
        while len(list(events.rglob("engine-*.jsonl"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.5)
        wait_for(store, len(committed(store)) + 200, process)
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        output, errors = process.communicate(timeout=500)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, output + errors
    keys = committed(store)
    assert len(keys) == NUM_SAMPLES
    assert set(keys.values()) == {1}
    story = next(project_file.parent.rglob("events.jsonl")).read_text().splitlines()
    deaths = [e for e in map(json.loads, story) if e["event"] == "teacher died"]
    assert [death["accuses"] for death in deaths] == [False]
