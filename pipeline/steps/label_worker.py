"""One engine in a process of its own: a Ray actor that works through leases of samples."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.logs import RunLog, fields
from storage.selection import SampleRequest
from storage.store import LabelStore
from teacher_server.backends.base import TeacherJob, start_backend
from teacher_server.label import LabelProgress, label_samples

log = logging.getLogger(__name__)

CONTROL = "control"
"""Ray's name of the thread that answers while the engine works."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says when it is ready."""

    node: str
    """Ray's id of the node that it runs on."""
    start_s: float
    """Seconds that its start took."""


class OpenLease:
    """How many samples of a lease may be begun.

    The engine begins them one by one, in order; another thread may take from the end what is not
    begun. Every sample is either begun or let go, never both.

    Args:
        size: Samples of the lease.
    """

    def __init__(self, size: int) -> None:
        self._end, self._begun = size, 0
        self._lock = threading.Lock()

    def begin(self) -> bool:
        """Whether the next sample may be begun; if so, it is."""
        with self._lock:
            if self._begun == self._end:
                return False
            self._begun += 1
            return True

    def let_go(self, count: int) -> int:
        """Take the last ``count`` samples off the end, or all that are not begun if fewer."""
        with self._lock:
            free = min(count, self._end - self._begun)
            self._end -= free
            return free


class TeacherWorker:
    """An engine at work.

    Args:
        job: What every backend is told.
        store_uri: The label store.
        facts: Provenance of its commits.
        commit_samples: Samples of a commit.
        report_s: Seconds between two reports of progress.
        log: Where this process writes its log.
    """

    def __init__(
        self,
        job: TeacherJob,
        store_uri: str,
        facts: dict[str, str],
        *,
        commit_samples: int,
        report_s: float,
        log: RunLog,
    ) -> None:
        self._job, self._store_uri, self._facts = job, store_uri, facts
        self._commit_samples, self._report_s = commit_samples, report_s
        self._log = log
        self._number = -1
        self._lease = OpenLease(0)
        self._early: dict[int, int] = defaultdict(int)
        self._arriving = threading.Lock()

    def start(self) -> EngineFacts:
        """Start the engine.

        Not part of the constructor: a failure there would reach the driver as text only.
        """
        import ray

        self._log.start("engine")
        began = time.monotonic()
        self._label_set = LabelStore(self._store_uri).open(self._job.spec.key)
        self._backend = start_backend(self._job)
        facts = EngineFacts(ray.get_runtime_context().get_node_id(), time.monotonic() - began)
        log.info("engine ready", extra=fields(seconds=facts.start_s, **self._backend.describe()))
        return facts

    def label(self, number: int, requests: list[SampleRequest]) -> Iterator[LabelProgress]:
        """Label and commit a lease; yields progress now and then, and once at the end.

        Args:
            number: Of the lease; every one has a higher number than those before.
            requests: The samples, in the order in which they are begun.
        """
        with self._arriving:
            self._number, self._lease = number, OpenLease(len(requests))
            self._lease.let_go(self._early.pop(number, 0))
        log.info("partition begun", extra=fields(partition=number, samples=len(requests)))
        lease, before = self._lease, self._backend.forward_tokens
        told = time.monotonic()
        progress = LabelProgress()
        for progress in label_samples(
            self._backend,
            requests,
            self._label_set,
            commit_samples=self._commit_samples,
            provenance=self._facts,
            should_stop=lambda: not lease.begin(),
        ):
            if time.monotonic() - told >= self._report_s:
                told = time.monotonic()
                yield self._since(before, progress)
        done = progress.committed_samples
        log.info("partition done", extra=fields(partition=number, committed=done))
        yield self._since(before, progress)

    def let_go(self, number: int, count: int) -> int:
        """Give back the last samples of a lease, as far as they are not begun.

        It runs beside ``label``, and may even come before it.

        Returns:
            How many; they will never be begun.
        """
        with self._arriving:
            if number > self._number:
                self._early[number] += count
                return count
            return self._lease.let_go(count) if number == self._number else 0

    def _since(self, before: int, progress: LabelProgress) -> LabelProgress:
        """Progress of this lease alone."""
        return replace(progress, forward_tokens=self._backend.forward_tokens - before)
