"""Ask the teacher for the misses: Ray actors, one engine each, that commit what they finish."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.cluster import Cluster, unwrapped
from pipeline.progress import Bars
from pipeline.project import Project
from pipeline.steps.plan import Plan, expected_response_tokens
from pipeline.steps.prepare import PreparedTeacher
from storage.errors import DistillError
from storage.label_set import LabelSet
from storage.provenance import provenance
from storage.selection import SampleRequest
from storage.store import LabelStore
from storage.view import LabelView
from teacher_server.backends.base import TeacherJob, start_backend
from teacher_server.config import VllmBackendConfig
from teacher_server.label import LabelProgress, label_samples

PARTITION_COMMITS = 16
"""Commits' worth of samples that an engine is given at once: long enough to stay full."""

MAX_ATTEMPTS = 3
"""Times that a partition is given out before the job fails."""


class TeacherWorker:
    """One engine in a process of its own (a Ray actor)."""

    def __init__(self, job: TeacherJob, store_uri: str, facts: dict[str, str]) -> None:
        self._job = job
        self._label_set = LabelStore(store_uri).open(job.spec.key)
        self._facts = facts

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
        ):
            yield LabelProgress(
                progress.finished_samples,
                progress.committed_samples,
                progress.response_tokens,
                progress.forward_tokens - before,
            )


def label_missing(project: Project, plan: Plan, teacher: PreparedTeacher, cluster: Cluster) -> int:
    """Label every sample of the plan that no label set serves; returns how many were labelled.

    Raises:
        DistillError: if a partition fails again and again; committed samples are kept.
    """
    view = project.store.view(plan.spec)
    misses = missing_requests(view, plan.requests())
    expected_tokens = expected_response_tokens(plan, misses, view)
    label_set = requested_label_set(project, plan, teacher, expected_tokens=expected_tokens)
    if not misses:
        return 0
    with project.timed("label", label_set=plan.spec.key, samples=len(misses)) as cost:
        _LabelJob(project, plan, teacher, cluster, label_set).run(misses, cost)
    return len(misses)


def missing_requests(view: LabelView, requests: Sequence[SampleRequest]) -> list[SampleRequest]:
    """The requests that no label set serves, in the order in which they are to be labelled."""
    served = view.contains([request.key for request in requests]).tolist()
    misses = [request for request, hit in zip(requests, served, strict=True) if not hit]
    # neighbours in key order share storage partitions, so a commit goes to few shards
    return sorted(misses, key=lambda request: request.key)


def requested_label_set(
    project: Project, plan: Plan, teacher: PreparedTeacher, *, expected_tokens: int = 0
) -> LabelSet:
    """The label set of the plan, created if need be.

    It exists also where other sets serve every sample: students find their labels by its key.
    """
    return project.store.create(
        plan.spec,
        {
            "teacher": str(project.config.teacher.model),
            "tokenizer": teacher.tokenizer,
            "chat_template": teacher.chat_template or "none",
            "project": project.config.name,
        },
        expected_tokens=expected_tokens,
    )


class _LabelJob:
    def __init__(
        self,
        project: Project,
        plan: Plan,
        teacher: PreparedTeacher,
        cluster: Cluster,
        label_set: LabelSet,
    ) -> None:
        self._project = project
        self._cluster = cluster
        self._label_set = label_set
        self._backend = project.config.teacher.backend
        self._commit_samples = project.config.label.commit_samples
        self._job = TeacherJob(
            model=teacher.model.directory,
            backend=self._backend,
            spec=plan.spec,
            max_model_len=min(plan.max_model_len, teacher.context),
        )
        self._finished = self._forward_tokens = self._response_tokens = 0

    def run(self, misses: list[SampleRequest], cost: dict[str, Any]) -> None:
        """Label all misses; what was spent is in ``cost`` also when it fails."""
        with Bars(self._project.console) as self._bars:
            try:
                self._run(misses)
            finally:
                cost["teacher_forward_tokens"] = self._forward_tokens
                cost["response_tokens"] = self._response_tokens

    def _run(self, misses: list[SampleRequest]) -> None:
        replicas, threads = self._backend.replicas, self._backend.threads
        self._cluster.require_cpus(
            replicas, threads, "teacher.backend.replicas and teacher.backend.threads"
        )
        ray = self._cluster.ray
        size = self._commit_samples * PARTITION_COMMITS
        partitions = deque(
            (misses[start : start + size], 1) for start in range(0, len(misses), size)
        )
        idle = [self._new_worker() for _ in range(min(replicas, len(partitions)))]
        with self._project.console.status("starting the teacher"):
            self._start(idle)
        self._num_misses, self._started = len(misses), time.monotonic()
        running: dict[Any, tuple[Any, list[SampleRequest], int, LabelProgress | None]] = {}
        while partitions or running:
            while idle and partitions:
                worker, (requests, attempt) = idle.pop(), partitions.popleft()
                stream = worker.label.options(num_returns="streaming").remote(
                    requests, self._commit_samples
                )
                running[stream] = (worker, requests, attempt, None)
            (stream, *_), _ = ray.wait(list(running), num_returns=1)
            worker, requests, attempt, last = running.pop(stream)
            try:
                progress = ray.get(next(stream))
            except StopIteration:
                idle.append(worker)
                continue
            except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
                left = self._label_set.missing([request.key for request in requests])
                self._project.note("teacher died", attempt=attempt, samples_left=len(left))
                if attempt >= MAX_ATTEMPTS:
                    raise DistillError(
                        f"the teacher died {attempt} times on the same {len(left)} samples "
                        f"(the first is {left[0] if left else 'none'}): {error}; finished samples "
                        "are kept, run the command again to go on"
                    ) from error
                remaining = set(left)
                partitions.append(([r for r in requests if r.key in remaining], attempt + 1))
                replacement = self._new_worker()
                self._start([replacement])
                idle.append(replacement)
                continue
            except ray.exceptions.RayTaskError as error:
                raise unwrapped(error) from None
            self._account(progress, last)
            running[stream] = (worker, requests, attempt, progress)
        for worker in idle:
            ray.kill(worker)

    def _start(self, workers: list[Any]) -> None:
        ray = self._cluster.ray
        try:
            ray.get([worker.start.remote() for worker in workers])
        except ray.exceptions.RayTaskError as error:
            raise unwrapped(error) from None

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

    def _account(self, progress: LabelProgress, last: LabelProgress | None) -> None:
        before = last or LabelProgress(0, 0, 0, 0)
        self._finished += progress.finished_samples - before.finished_samples
        self._response_tokens += progress.response_tokens - before.response_tokens
        self._forward_tokens += progress.forward_tokens - before.forward_tokens
        rate = self._response_tokens / max(1e-9, time.monotonic() - self._started)
        self._bars.show("labelling", self._finished, self._num_misses, f"{rate:.0f} tok/s")
