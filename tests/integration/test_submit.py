"""Projects as jobs of a cluster: only the working directory is uploaded, exit codes come back."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.cluster import RAY_ENVIRONMENT
from pipeline.layout import PACKAGES
from pipeline.stopping import EXIT_CODE
from pipeline.submit import JOB_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
Distill = Callable[..., subprocess.CompletedProcess[str]]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with everything that is locked and without our packages, as the nodes have it."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder)
    (site_packages,) = folder.glob("lib/*/site-packages")
    # only its folder: what its own .pth files add, such as this checkout, is not followed
    (site_packages / "locked.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    for package, found in (("ray", 0), ("pipeline", 1)):
        done = subprocess.run([python, "-c", f"import {package}"], cwd=folder, capture_output=True)
        assert done.returncode == found, done.stderr
    return python


@pytest.fixture(scope="module")
def job_server(bare_python: Path) -> Iterator[str]:
    """Address of the job server of a cluster of one node, which has none of our packages."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # Ray's socket paths have 107 bytes at most
    dashboard = free_port()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # the flags name every port, so that no other Ray on this machine is in the way
    names = ["port", "ray-client-server-port", "dashboard-agent-listen-port"]
    names += ["dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port"]
    ports = {"dashboard-port": dashboard, **{name: free_port() for name in names}}
    log = folder / "start.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [
                *(
                    bare_python,
                    "-m",
                    "ray.scripts.scripts",
                    "start",
                    "--head",
                    "--block",
                    "--num-cpus=2",
                    "--dashboard-host=127.0.0.1",
                ),
                *(f"--{name}={port}" for name, port in ports.items()),
                *("--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=200000000"),
                *("--disable-usage-stats", f"--temp-dir={folder}"),
            ],
            cwd=folder,
            env={
                **environment,
                **RAY_ENVIRONMENT,
                "PATH": f"{bare_python.parent}:{os.environ['PATH']}",  # jobs run its python
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    from ray.job_submission import JobSubmissionClient

    address = f"http://127.0.0.1:{dashboard}"
    waiting = threading.Event()
    deadline = time.monotonic() + 120
    while True:
        try:
            JobSubmissionClient(address).list_jobs()
            break
        except Exception:  # noqa: BLE001 - not up yet: several kinds of errors
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            waiting.wait(1)
    yield address
    head.send_signal(signal.SIGTERM)  # --block: it ends the processes that it started
    head.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def working_dir(tmp_path: Path, project_file: Path) -> Path:
    """A directory with the prompts and a project that is labelled by the fake; no packages."""
    folder = tmp_path / "upload"
    folder.mkdir()
    tree = yaml.safe_load(project_file.read_text())
    for split in ("train", "heldout"):
        shutil.copy(project_file.parent / f"{split}.jsonl", folder)
        tree["data"][split] = [{"path": f"{split}.jsonl"}]
    tree["teacher"]["backend"] = {"type": "fake"}
    del tree["train"], tree["students"]
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder


def test_a_project_is_submitted_reused_and_its_end_comes_back(
    working_dir: Path, job_server: str, distill: Distill, tmp_path: Path
) -> None:
    words = ("submit", working_dir / "run.yaml", "--working-dir", working_dir)
    address = ("--address", job_server)
    first = distill(*words, *address)
    assert "labels: 30 samples labelled" in first.stdout
    ended = json.loads(distill("status", "--store", tmp_path / "labels", "--json").stdout)
    assert [run["state"] for run in ended] == ["finished"]

    # the plain command of Ray does the same with a checkout; what is cached is not asked for again
    for name in PACKAGES:
        shutil.copytree(
            ROOT / name, working_dir / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    plain = subprocess.run(
        [
            *(RAY, "job", "submit", "--address", job_server, "--working-dir", str(working_dir)),
            *("--", "python", "-m", "pipeline", "run", "run.yaml"),
        ],
        cwd=tmp_path,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert "the teacher was called 0 times" in plain.stdout

    failed = distill(*words, *address, "--set", "data.train=[{path: gone.jsonl}]", expect=2)
    assert "gone.jsonl" in failed.stdout


def test_a_stopped_client_stops_the_job(working_dir: Path, job_server: str, tmp_path: Path) -> None:
    """The job finishes what is in flight, says what is labelled, and the next one goes on."""
    config = working_dir / "run.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["teacher"]["backend"] = {"type": "fake", "hang_token": 5}
    config.write_text(yaml.safe_dump(tree))
    command = [
        *(sys.executable, "-m", "pipeline", "submit", str(config)),
        *("--working-dir", str(working_dir), "--address", job_server),
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        for line in client.stdout:
            if line.startswith("job "):
                break
        client.send_signal(signal.SIGINT)
        rest = client.stdout.read()
        assert client.wait(240) == EXIT_CODE, rest


def test_a_run_inside_a_job_refuses_paths_that_ray_deletes(
    working_dir: Path, monkeypatch: pytest.MonkeyPatch, distill: Distill
) -> None:
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    done = distill("plan", working_dir / "run.yaml", "--set", "store=./labels", expect=2)
    assert "store './labels' is a relative path" in done.stderr
