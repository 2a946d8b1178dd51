"""Ray, started when the first step has work and never before.

Every process gets an explicit number of threads, and their sum never exceeds the machine.
"""

import logging
import math
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from pipeline.config import ClusterConfig
from pipeline.layout import check_layout
from pipeline.manners import QUIET_ENVIRONMENT
from storage.errors import ConfigError, DistillError

OBJECT_STORE_BYTES = 256 * 2**20
"""Ray's object store on one machine: progress messages are all it carries."""

MEMORY_SHARE = 0.8
"""Share of the machine's memory that engines and trainers get; the rest is the driver's, Ray's
and the operating system's."""

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray otherwise turns token authentication on for some of its parts and not for others
    "RAY_AUTH_MODE": "disabled",
    # a loaded machine needs longer than the defaults of 30 and 60 s
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


ELASTIC_ENVIRONMENT = {
    # after a machine is lost, Ray waits so long for the old number of workers before it takes fewer
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "90",
}


class Cluster:
    """A lazy connection to Ray; a context manager that ends what it started.

    Args:
        config: Address and shares.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._ray: Any = None

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._ray is not None:
            self._ray.shutdown()

    @property
    def started(self) -> bool:
        """Whether any step needed Ray so far."""
        return self._ray is not None

    @property
    def ray(self) -> Any:
        """The ray module, connected; the first access starts or joins the cluster."""
        if self._ray is None:
            elastic = ELASTIC_ENVIRONMENT if self._config.is_elastic else {}
            for name, value in {**RAY_ENVIRONMENT, **elastic}.items():
                os.environ.setdefault(name, value)
            import ray

            check_layout()
            address, local = self._address, self.is_local
            ray.init(
                address=address,
                num_cpus=self.cpus if local else None,
                # labels never travel through Ray's object store; it takes 30 % when not told
                object_store_memory=OBJECT_STORE_BYTES if local else None,
                _memory=self._local_memory_bytes if local else None,
                include_dashboard=False if local else None,
                log_to_driver=bool(os.environ.get("DISTILL_WORKER_LOGS")),
                logging_level=logging.ERROR,
                configure_logging=True,
            )
            self._ray = ray
        return self._ray

    @property
    def _address(self) -> str:
        return os.environ.get("RAY_ADDRESS") or self._config.address

    @property
    def is_local(self) -> bool:
        """Whether Ray is started here, for this command alone."""
        return self._address == "local"

    @property
    def cpus(self) -> int:
        """CPUs of this machine that may be used."""
        return self._config.cpus or len(os.sched_getaffinity(0))

    @property
    def student_threads(self) -> int:
        """CPU threads of one training process."""
        _, workers = self._config.worker_bounds
        return self._config.student_threads or max(1, self.cpus // workers)

    @property
    def _local_memory_bytes(self) -> int:
        """Memory of this machine that processes may share out."""
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(total * MEMORY_SHARE) - OBJECT_STORE_BYTES

    def memory_bytes(self, threads: int) -> int:
        """Memory share of a process with so many threads: shares never exceed the machine."""
        return self._local_memory_bytes * threads // max(self.cpus, threads)

    def require_cpus(self, processes: int, threads: int, settings: str) -> None:
        """Refuse what this machine cannot hold; Ray would wait for the CPUs for ever.

        Raises:
            ConfigError: naming the settings and the CPUs there are.
        """
        if self.is_local and processes * threads > self.cpus:
            raise ConfigError(
                f"{settings} ask for {processes} x {threads} CPUs, this machine gives {self.cpus}; "
                "lower them, or join a cluster with cluster.address"
            )

    def students_at_once(self, wanted: int) -> int:
        """How many of the wanted students are trained side by side.

        Raises:
            ConfigError: if the settings ask for more than this machine has.
        """
        fewest, workers = self._config.worker_bounds
        threads, gpus = self.student_threads, self._config.gpus_per_worker
        self.require_cpus(
            fewest * min(wanted, self._config.students_at_once or 1),
            threads,
            "cluster.student_workers, cluster.student_threads and cluster.students_at_once",
        )
        if self._config.students_at_once is not None:
            return min(wanted, self._config.students_at_once)
        if self._config.is_elastic:
            return 1
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        places = sum(
            int(min(n.get("CPU", 0) // threads, n.get("GPU", 0) // gpus if gpus else math.inf))
            for n in nodes
        )
        return max(1, min(wanted, places // workers))

    def options(self, *, threads: int, gpus: float = 0, env: Mapping[str, str] = {}) -> Any:
        """Ray options of a task or actor: its share of the machine and its environment."""
        return {
            "num_cpus": threads,
            "num_gpus": gpus,
            **({"memory": self.memory_bytes(threads)} if self.is_local else {}),
            "runtime_env": {
                "env_vars": {**QUIET_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), **env}
            },
        }


def unwrapped(error: BaseException) -> BaseException:
    """The failure that a user can fix inside an error that travelled through Ray, or the error."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        cause = getattr(current, "cause", None)
        if isinstance(current, DistillError) and cause is None:  # with one, it is Ray's copy of it
            return current
        seen.append(current)
        current = cause or current.__cause__
    return error
