"""SIGKILL at random moments of a whole project of tiny models, again and again.

Rounds: ``DISTILL_SOAK_ROUNDS`` (default 12). The outcome is written to ``benchmarks/soak.md``.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa

from storage.provenance import git_revision, utc_now

REPOSITORY = Path(__file__).parent.parent.parent
ROUNDS = int(os.environ.get("DISTILL_SOAK_ROUNDS", "12"))
LONGEST_LIFE_S = 20.0
SAMPLES = 30


def committed(store: Path) -> tuple[dict[str, bytes], Counter[str]]:
    """Committed files, and how often each sample key stands in them."""
    files: dict[str, bytes] = {}
    keys: Counter[str] = Counter()
    for record in sorted(store.rglob("commits/*.json")):
        files[str(record)] = record.read_bytes()
        for shard in json.loads(record.read_bytes())["shards"]:
            for table in ("labels", "samples"):
                path = record.parent.parent / "shards" / f"{shard['name']}.{table}.arrow"
                files[str(path)] = path.read_bytes()
            table = pa.ipc.open_file(files[str(path)]).read_all()
            keys.update(table.column("sample_key").to_pylist())
    return files, keys


def run(project_file: Path, life_s: float | None) -> int:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(project_file)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=life_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return -signal.SIGKILL


def test_kills_at_random_moments_lose_nothing_and_double_nothing(project_file: Path) -> None:
    moments = random.Random(0)
    store = project_file.parent / "labels"
    before: dict[str, bytes] = {}
    started = time.monotonic()
    killed = 0
    for _ in range(ROUNDS):
        killed += run(project_file, moments.uniform(3.0, LONGEST_LIFE_S)) != 0
        files, keys = committed(store)
        assert {name: files.get(name) for name in before} == before
        assert set(keys.values()) <= {1}
        before = files
    assert run(project_file, None) == 0
    files, keys = committed(store)
    assert {name: files[name] for name in before} == before
    assert len(keys) == SAMPLES
    assert set(keys.values()) == {1}
    report = json.loads((project_file.parent / "runs" / "tiny" / "report.json").read_text())
    untrained, trained = report["evaluations"]
    assert trained["metrics"]["kl"] < untrained["metrics"]["kl"]
    write_result(killed, time.monotonic() - started)


def write_result(killed: int, seconds: float) -> None:
    (REPOSITORY / "benchmarks" / "soak.md").write_text(
        "# Kills at random moments\n\n"
        "`make soak`: a project of tiny models (30 samples, one student) is started again and "
        "again and killed with SIGKILL after 3 to 20 s, then run to its end.\n\n"
        f"commit {git_revision()}, {utc_now()}, {os.cpu_count()} cores\n\n"
        "| | |\n|---|---|\n"
        f"| runs started | {ROUNDS + 1} |\n"
        f"| killed before their end | {killed} |\n"
        f"| samples lost / doubled | 0 / 0 of {SAMPLES} |\n"
        "| committed files changed | 0 |\n"
        f"| wall time | {seconds:.0f} s |\n",
        encoding="utf-8",
    )
