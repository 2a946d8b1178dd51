"""Engines at work: Ray actors that pull partitions of samples and commit what they finish.

Any of them may die at any time. What was committed stays, what was not goes back to the queue, and
a new engine takes the place of the dead one. A sample that kills engines is found and set aside.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.cluster import Cluster, unwrapped
from pipeline.project import Project
from pipeline.steps.partitions import Partition, PartitionQueue
from pipeline.steps.plan import Plan
from pipeline.steps.prepare import PreparedTeacher
from pipeline.stopping import StoppedError, StopRequest, stop_on_sigterm
from storage.errors import DistillError
from storage.label_set import LabelSet
from storage.provenance import provenance
from storage.quarantine import Quarantine, Reason
from storage.selection import SampleRequest
from storage.store import LabelStore
from teacher_server.backends.base import TeacherJob, start_backend
from teacher_server.config import VllmBackendConfig
from teacher_server.label import LabelProgress, label_samples

PARTITION_COMMITS = 16
"""Commits' worth of samples that an engine is given at once: long enough to stay full."""

POLL_S = 2.0
"""Seconds between two looks at deadlines and at the request to stop."""

STOP_FLAG = "distill-stop"
"""Name of the actor whose existence tells the workers of this job to stop."""


class TeacherWorker:
    """One engine in a process of its own (a Ray actor)."""

    def __init__(self, job: TeacherJob, store_uri: str, facts: dict[str, str]) -> None:
        self._job = job
        self._label_set = LabelStore(store_uri).open(job.spec.key)
        self._facts = facts
        self._asked = 0.0
        self._stop = False

    def start(self) -> dict[str, str]:
        """Start the engine; returns its name, version and device.

        Not part of the constructor: a failure there would reach the driver as text only.
        """
        self._backend = start_backend(self._job)
        return self._backend.describe()

    def label(self, requests: list[SampleRequest], commit_samples: int) -> Iterator[LabelProgress]:
        """Label and commit; yields progress after every sample."""
        before = self._backend.forward_tokens
        for progress in label_samples(
            self._backend,
            requests,
            self._label_set,
            commit_samples=commit_samples,
            provenance=self._facts,
            should_stop=self._should_stop,
        ):
            yield replace(progress, forward_tokens=progress.forward_tokens - before)

    def _should_stop(self) -> bool:
        """Whether the driver was asked to stop; it is asked about every POLL_S."""
        if not self._stop and time.monotonic() - self._asked > POLL_S:
            self._asked = time.monotonic()
            self._stop = _stop_flag_exists()
        return self._stop


class _StopFlag:
    """An actor that does nothing: a name that every worker of the job can look up."""


def _stop_flag_exists() -> bool:
    import ray

    try:
        ray.get_actor(STOP_FLAG)
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class _Shift:
    """One engine at work on one partition."""

    worker: Any
    partition: Partition
    last: LabelProgress = field(default_factory=LabelProgress)
    active: float = field(default_factory=time.monotonic)
    """When it was last heard of."""


class LabelJob:
    """Labels requests with a pool of engines.

    Args:
        project: The project.
        plan: What is wanted.
        teacher: Who labels.
        cluster: Where.
        label_set: Where the labels go.
        num_aside: Requested samples that are in quarantine already.
    """

    def __init__(
        self,
        project: Project,
        plan: Plan,
        teacher: PreparedTeacher,
        cluster: Cluster,
        label_set: LabelSet,
        *,
        num_aside: int = 0,
    ) -> None:
        self._project, self._cluster = project, cluster
        self._label_set, self._quarantine = label_set, Quarantine(label_set)
        self._backend = project.config.teacher.backend
        self._label = project.config.label
        self._limit = self._label.bad_samples_allowed(len(plan.requests()))
        self._job = TeacherJob(
            model=teacher.model.directory,
            adapter=teacher.adapter,
            backend=self._backend,
            spec=plan.spec,
            max_model_len=min(plan.max_model_len, teacher.context),
        )
        self._num_aside = num_aside
        self.num_bad = 0
        """Samples that this job set aside."""
        self._finished = self._forward_tokens = self._response_tokens = 0
        self._shifts: dict[Any, _Shift] = {}
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []

    def run(self, misses: Sequence[SampleRequest], cost: dict[str, Any]) -> None:
        """Label all misses; what was spent is in ``cost`` also when it fails.

        Raises:
            DistillError: if too many samples had to be set aside, or an engine refuses to work.
            StoppedError: if this process was asked to stop.
        """
        replicas, threads = self._backend.replicas, self._backend.threads
        self._cluster.require_cpus(
            replicas, threads, "teacher.backend.replicas and teacher.backend.threads"
        )
        self._num_misses, self._started = len(misses), time.monotonic()
        self._queue = PartitionQueue(misses, self._label.commit_samples * PARTITION_COMMITS)
        ray = self._cluster.ray  # connected before, it would take the signal from us
        with self._project.bars() as self._bars, stop_on_sigterm() as stop:
            try:
                self._work(stop)
            finally:
                cost["teacher_forward_tokens"] = self._forward_tokens
                cost["response_tokens"] = self._response_tokens
                cost["quarantined"] = self.num_bad
                for worker in self._workers:
                    ray.kill(worker)
        if stop.requested:
            left = len(self._label_set.missing([request.key for request in misses]))
            raise StoppedError(
                f"stopped: {len(misses) - left} of {len(misses)} samples are labelled and "
                "committed; run the command again to go on"
            )

    @property
    def _workers(self) -> list[Any]:
        return [*self._idle, *self._starting.values(), *(s.worker for s in self._shifts.values())]

    # -- the loop ---------------------------------------------------------------------------------
    def _work(self, stop: StopRequest) -> None:
        flag = None
        with self._project.console.status("starting the teacher"):
            self._hire()
            self._advance(timeout=None)
        while self._queue or self._shifts:
            if stop.requested and flag is None:
                self._project.say("stopping: what the teacher has begun is finished and committed")
                self._queue.clear()
                actor = self._cluster.ray.remote(_StopFlag)
                flag = actor.options(name=STOP_FLAG, num_cpus=0).remote()
            self._hire()
            while self._idle and self._queue:
                self._begin(self._idle.pop(), self._queue.take())
            self._advance(timeout=POLL_S)
            self._check_deadlines()

    def _hire(self) -> None:
        """As many engines as there is work for."""
        wanted = min(self._backend.replicas, len(self._queue) + len(self._shifts))
        while len(self._workers) < wanted:
            worker = self._new_worker()
            self._starting[worker.start.remote()] = worker

    def _begin(self, worker: Any, partition: Partition) -> None:
        requests = list(partition.requests)
        stream = worker.label.options(num_returns="streaming").remote(
            requests, self._label.commit_samples
        )
        self._shifts[stream] = _Shift(worker, partition)

    def _advance(self, *, timeout: float | None) -> None:
        """Take up the next news of engines that start or work."""
        ray = self._cluster.ray
        waiting = [*self._starting, *self._shifts]
        ready, _ = ray.wait(waiting, num_returns=1, timeout=timeout)
        for news in ready:
            if news in self._starting:
                self._arrived(news)
            else:
                self._heard(news)

    def _arrived(self, started: Any) -> None:
        """An engine has started.

        Raises:
            DistillError: if it has not.
        """
        ray = self._cluster.ray
        worker = self._starting.pop(started)
        try:
            ray.get(started)
        except ray.exceptions.RayTaskError as error:
            raise unwrapped(error) from None
        except ray.exceptions.RayActorError as error:
            raise DistillError(
                f"the teacher died while it started: {error}; it may need more memory "
                "(teacher.backend), run `distill doctor`"
            ) from error
        self._idle.append(worker)

    def _heard(self, stream: Any) -> None:
        """An engine has finished a sample or a partition, or died."""
        ray = self._cluster.ray
        shift = self._shifts[stream]
        try:
            progress = ray.get(next(stream))
        except StopIteration:
            del self._shifts[stream]
            self._idle.append(shift.worker)
        except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
            self._died(stream, "engine died", str(error))
        except ray.exceptions.RayTaskError as error:
            cause = unwrapped(error)
            if isinstance(cause, DistillError):
                raise cause from None
            self._died(stream, "engine died", str(error))
        else:
            self._account(progress, shift.last)
            shift.last, shift.active = progress, time.monotonic()

    def _check_deadlines(self) -> None:
        """Give up engines that have not finished a sample for too long."""
        for stream, shift in list(self._shifts.items()):
            silent = time.monotonic() - shift.active
            if silent > self._label.deadline_s:
                self._died(stream, "engine hung", f"no sample was finished for {silent:.0f} s")

    # -- deaths -----------------------------------------------------------------------------------
    def _died(self, stream: Any, reason: Reason, detail: str) -> None:
        """Put back what a dead engine has left; a sample that is to blame is set aside."""
        shift = self._shifts.pop(stream)
        self._cluster.ray.kill(shift.worker)
        keys = [request.key for request in shift.partition.requests]
        missing = set(self._label_set.missing(keys)) - self._quarantine.keys()
        left = [request for request in shift.partition.requests if request.key in missing]
        # what it had pulled: what was in flight, and what was finished but not committed
        uncommitted = shift.last.finished_samples - shift.last.committed_samples
        begun = self._backend.in_flight + uncommitted
        deaths = shift.partition.deaths + 1
        self._project.note(
            "teacher died", reason=reason, detail=detail[:500], deaths=deaths, left=len(left)
        )
        guilty = self._queue.died(shift.partition, left, begun)
        if guilty is not None:
            text = f"{reason} {deaths} times on this sample alone: {detail}"
            facts = {**provenance(), "backend": self._backend.type}
            self._quarantine.add(guilty.key, reason, text, facts)
            self._set_aside(1)

    def _set_aside(self, count: int) -> None:
        self.num_bad += count
        self.require_few_bad_samples()

    def require_few_bad_samples(self) -> None:
        """Refuse to go on with too many samples in quarantine.

        Raises:
            DistillError: saying why the last of them were set aside.
        """
        total = self._num_aside + self.num_bad
        if total <= self._limit:
            return
        shown = "\n  ".join(f"{s.sample}: {s.detail[:300]}" for s in self._quarantine.samples()[:5])
        raise DistillError(
            f"{total} samples are in quarantine, label.max_bad_samples allows {self._limit}:\n  "
            f"{shown}\nwhat is labelled is kept; repair the cause and run `distill label "
            "--retry-quarantined`, or raise label.max_bad_samples"
        )

    def _new_worker(self) -> Any:
        env = {}
        gpus = 0
        if isinstance(self._backend, VllmBackendConfig):
            from teacher_server.backends.vllm_engine import vllm_environment

            env = vllm_environment(self._backend)
            gpus = self._backend.tensor_parallel if self._project.config.cluster.teacher_gpus else 0
        options = self._cluster.options(threads=self._backend.threads, gpus=gpus, env=env)
        actor = self._cluster.ray.remote(TeacherWorker)
        return actor.options(**options).remote(self._job, self._project.store_uri, provenance())

    def _account(self, progress: LabelProgress, before: LabelProgress) -> None:
        self._finished += progress.finished_samples - before.finished_samples
        self._response_tokens += progress.response_tokens - before.response_tokens
        self._forward_tokens += progress.forward_tokens - before.forward_tokens
        rate = self._response_tokens / max(1e-9, time.monotonic() - self._started)
        self._bars.show("labelling", self._finished, self._num_misses, f"{rate:.0f} tok/s")
        if progress.bad_samples > before.bad_samples:
            self._set_aside(progress.bad_samples - before.bad_samples)
