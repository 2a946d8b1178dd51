"""Send a run to a cluster as a Ray job, follow it, and end as it ended."""

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.cluster import RAY_ENVIRONMENT
from pipeline.config import RunConfig
from pipeline.stopping import EXIT_CODE, STOP_SIGNALS
from pipeline.upload import EXCLUDED, upload_directory
from storage.errors import ConfigError, DistillError
from storage.objects import REMOTE_SCHEMES

STOP_GRACE_S = 120
"""A job that is asked to stop finishes its batches and commits; Ray's default of 3 s kills it."""
POLL_S = 0.5
STARTING_S = 120
STILL_STARTING = "No available agent"
"""What the job server says of a head that has just started."""
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job."""


class ClusterError(DistillError):
    """The cluster does not answer or does not take the job."""


def require_lasting_paths(config: RunConfig) -> None:
    """A job runs in a directory that Ray deletes: what it makes must lie elsewhere.

    Raises:
        ConfigError: if the store or the run folder is a relative path.
    """
    for name, path in (("store", config.store), ("runs", config.runs)):
        local = not path.startswith((*REMOTE_SCHEMES, "file://"))
        if local and not Path(path).expanduser().is_absolute():
            raise ConfigError(
                f"{name} {path!r} is a relative path: a job would write it to a directory that Ray "
                f"deletes; use an absolute path on a file system of the whole cluster"
                + (" or a bucket" if name == "store" else "")
            )


def runs_as_job() -> bool:
    """Whether this process is the driver of a submitted job."""
    return JOB_VARIABLE in os.environ


def entrypoint(config: Path, overrides: Sequence[str], working_dir: Path) -> str:
    """The command line of the job.

    Raises:
        ConfigError: if the configuration is not in the working directory.
    """
    try:
        relative = config.resolve().relative_to(working_dir.resolve())
    except ValueError:
        raise ConfigError(
            f"config {str(config)!r} is outside of the working directory {str(working_dir)!r}, "
            "which is all that is uploaded; copy it there"
        ) from None
    words = ["python", "-u", "-m", "pipeline", "run", str(relative)]
    for override in overrides:
        words += ["--set", override]
    return shlex.join(words)


class JobClient:
    """A connection to the job server of a cluster.

    Args:
        address: Of the dashboard, such as ``http://head:8265``; by default Ray's variables say it.

    Raises:
        ClusterError: if nothing answers there.
    """

    def __init__(self, address: str | None) -> None:
        for name, value in RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.WARNING)
        try:
            self._client: Any = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"no job server of Ray answers at {address or 'the default address'}: "
                f"{str(error).splitlines()[0]}; start one (`ray start --head`) or name it by "
                "--address"
            ) from error

    def submit(self, command: str, working_dir: Path) -> str:
        """Upload the working directory and start the job; returns its id.

        The runtime environment holds no credentials: those belong to the nodes.

        Raises:
            ClusterError: if the job is not taken, for example because too much would be uploaded.
            ConfigError: if the working directory cannot be uploaded.
        """
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)}
        variables |= {name: os.environ[name] for name in ("RAY_AUTH_MODE",)}
        patience = time.monotonic() + STARTING_S
        while True:
            try:
                job = self._submit(command, working_dir, variables)
            except (RuntimeError, ValueError, OSError) as error:
                if STILL_STARTING in str(error) and time.monotonic() < patience:
                    time.sleep(POLL_S)
                    continue
                raise ClusterError(f"the cluster did not take the job: {error}") from error
            return job

    def _submit(self, command: str, working_dir: Path, variables: dict[str, str]) -> str:
        with upload_directory(working_dir) as uploaded:
            environment = {
                "working_dir": str(uploaded),
                "excludes": list(EXCLUDED),
                "env_vars": variables,
            }
            job: str = self._client.submit_job(entrypoint=command, runtime_env=environment)
        return job

    def submit_and_follow(
        self,
        command: str,
        working_dir: Path,
        *,
        started: Callable[[str], None],
        show: Callable[[str], None],
    ) -> tuple[str, int]:
        """Start the job and show what it prints until it ends; its id and its exit code.

        From before the upload on, SIGINT and SIGTERM ask the job to stop, also one that is only
        about to start, and following goes on; a second signal leaves the job alone.

        Args:
            command: Of the job.
            working_dir: What is uploaded.
            started: Told the id of the job.
            show: Told what the job prints.

        Raises:
            ClusterError: if the job is not taken.
        """
        with self._stops() as stopping:
            job = self.submit(command, working_dir)
            stopping.job_is(job)
            started(job)
            asyncio.run(self._follow(job, show))
        details = self._client.get_job_info(job)
        if details.status == "STOPPED":
            return job, EXIT_CODE
        if details.status == "SUCCEEDED":
            return job, 0
        if details.driver_exit_code is None:
            show(f"job {job} failed: {details.message}\n")
        return job, int(details.driver_exit_code or 1)

    async def _follow(self, job: str, show: Callable[[str], None]) -> None:
        async for text in self._client.tail_job_logs(job):
            show(text)
        while not self._client.get_job_status(job).is_terminal():  # the log may end first
            await asyncio.sleep(POLL_S)

    @contextlib.contextmanager
    def _stops(self) -> Iterator["_Stopping"]:
        stopping = _Stopping(self._client)
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def stop(number: int, frame: FrameType | None) -> None:
            restore()
            stopping.request()

        for number in STOP_SIGNALS:
            signal.signal(number, stop)
        try:
            yield stopping
        finally:
            restore()


class _Stopping:
    """A request to stop a job that may come before the job has an id."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._job: str | None = None
        self._requested = False

    def request(self) -> None:
        """Stop the job now, or as soon as it is known."""
        self._requested = True
        if self._job is not None:
            self._client.stop_job(self._job)

    def job_is(self, job: str) -> None:
        """Which job to stop."""
        self._job = job
        if self._requested:
            self._client.stop_job(job)
