"""Engines at work: Ray actors that label leases of samples and commit what they finish.

What to do next is decided by :mod:`pipeline.schedule`. Here Ray's news becomes its events, and its
decisions become calls of actors. Any of them may die at any time: what was committed stays.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.cluster import Cluster, unwrapped
from pipeline.project import Project
from pipeline.schedule import Schedule, ScheduleLimits
from pipeline.schedule_events import (
    Ask,
    Decision,
    Died,
    Event,
    Fail,
    Finished,
    Give,
    GiveUp,
    Hire,
    Kill,
    Progress,
    Released,
    Started,
    StartFailed,
    Stop,
    Tick,
)
from pipeline.steps.label_figures import LabelFigures
from pipeline.steps.label_worker import CONTROL, EngineFacts, TeacherWorker
from pipeline.steps.plan import Plan
from pipeline.steps.prepare import PreparedTeacher
from pipeline.stopping import StoppedError, StopRequest, stop_on_signals
from storage.errors import DistillError
from storage.label_set import LabelSet
from storage.provenance import provenance
from storage.quarantine import Quarantine, Reason
from storage.selection import SampleRequest
from teacher_server.backends.base import TeacherJob
from teacher_server.config import VllmBackendConfig
from teacher_server.label import LabelProgress

POLL_S = 2.0
"""Seconds between two looks at deadlines and at the request to stop."""

REPORT_S, REPORTS_PER_S = 1.0, 50.0
"""An engine reports every second, or as often as leaves the driver so many reports in a second."""

KEYS_AT_ONCE = 2**16
"""Samples about which the store is asked at once."""


class Misses(Protocol):
    """The samples to label, by their number in the order in which they are to be labelled."""

    def __len__(self) -> int: ...

    def keys(self, numbers: Sequence[int]) -> list[str]:
        """Sample keys of some of them."""

    def requests(self, numbers: Sequence[int]) -> list[SampleRequest]:
        """Some of them, made when they are asked for."""


@dataclass(slots=True)
class _Engine:
    """An actor, and what it was asked."""

    actor: Any
    node: str | None = None
    """Where it runs, once it has started."""
    number: int = -1
    """Of its last lease."""
    last: LabelProgress = field(default_factory=LabelProgress)
    """What it reported last of this lease."""


class LabelJob:
    """Labels samples with a pool of engines.

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
        self._engines: dict[int, _Engine] = {}
        self._awaited: dict[Any, tuple[str, int]] = {}
        """What Ray will have news of, in the order of asking: which call of which engine."""
        self._num_leases = 0
        self._start_error: BaseException | None = None

    def run(self, misses: Misses, cost: dict[str, Any]) -> None:
        """Label all misses; what was spent is in ``cost`` also when it fails.

        Raises:
            DistillError: if too many samples had to be set aside, or an engine refuses to work.
            StoppedError: if this process was asked to stop.
        """
        self._cluster.require_cpus(
            self._backend.replicas,
            self._backend.threads,
            "teacher.backend.replicas and teacher.backend.threads",
        )
        self._misses = misses
        limits = ScheduleLimits(
            engines=self._backend.replicas,
            commit_samples=self._label.commit_samples,
            in_flight=self._backend.in_flight,
            deadline_s=self._label.deadline_s,
        )
        self._schedule = Schedule(len(misses), limits)
        ray = self._cluster.ray  # connected before, it would take the signal from us
        price = self._project.config.cluster.engine_hour_cost
        self._figures = LabelFigures(len(misses), time.monotonic(), price)
        with self._project.bars() as self._bars, stop_on_signals() as stop:
            try:
                self._work(stop)
            finally:
                cost.update(self._figures.facts(time.monotonic()))
                cost |= {"steals": self._schedule.steals, "quarantined": self.num_bad}
                for engine in self._engines.values():
                    ray.kill(engine.actor)
        if stop.requested:
            left = self._count_missing()
            raise StoppedError(
                f"stopped: {len(misses) - left} of {len(misses)} samples are labelled and "
                "committed; run the command again to go on"
            )

    def _count_missing(self) -> int:
        starts = range(0, len(self._misses), KEYS_AT_ONCE)
        groups = (range(s, min(s + KEYS_AT_ONCE, len(self._misses))) for s in starts)
        return sum(len(self._label_set.missing(self._misses.keys(group))) for group in groups)

    # -- the loop ---------------------------------------------------------------------------------
    def _work(self, stop: StopRequest) -> None:
        with self._project.console.status("starting the teacher"):
            self._tell(Tick(time.monotonic()))
            while not (self._schedule.is_done or self._schedule.num_working):
                self._turn(stop)
        while not self._schedule.is_done:
            self._turn(stop)

    def _turn(self, stop: StopRequest) -> None:
        """Wait for news, take up all there are, and look at the clock."""
        if stop.requested and not self._schedule.is_stopped:
            self._project.say("stopping: what the teacher has begun is finished and committed")
            self._tell(Stop())
        for ref in self._news():
            # what was taken up before may have ended the engine that this is about
            if ref in self._awaited:
                self._take_up(ref, *self._awaited[ref])
        self._tell(Tick(time.monotonic()))
        self._project.metrics.set("engines", self._schedule.num_working)

    def _news(self) -> list[Any]:
        """Everything that there is news of; waits a little for the first."""
        ray, awaited = self._cluster.ray, list(self._awaited)
        if not awaited:
            time.sleep(POLL_S)
            return []
        first, _ = ray.wait(awaited, num_returns=1, timeout=POLL_S)
        if not first:
            return []
        ready, _ = ray.wait(awaited, num_returns=len(awaited), timeout=0)
        return list(ready)

    def _take_up(self, ref: Any, call: str, number: int) -> None:
        engine = self._engines[number]
        if call == "start":
            del self._awaited[ref]
            self._started(ref, number, engine)
        elif call == "label":
            self._heard(ref, number, engine)
        else:
            del self._awaited[ref]
            self._let_go(ref, number)

    def _tell(self, event: Event) -> list[Decision]:
        """Tell the schedule, and do what it decides; returns the decisions."""
        decisions = self._schedule.on(event)
        for decision in decisions:
            self._obey(decision)
        return decisions

    def _obey(self, decision: Decision) -> None:
        match decision:
            case Hire(number):
                engine = self._engines[number] = _Engine(self._new_actor())
                self._awaited[engine.actor.start.remote()] = ("start", number)
            case Give(number, samples):
                self._give(self._engines[number], number, self._misses.requests(samples))
            case Ask(number, count):
                engine = self._engines[number]
                let_go = engine.actor.let_go.options(concurrency_group=CONTROL)
                self._awaited[let_go.remote(engine.number, count)] = ("let go", number)
            case Kill(number, silent_s):
                self._died(number, "engine hung", f"no sample was finished for {silent_s:.0f} s")
            case Fail(failures):
                assert self._start_error is not None
                raise DistillError(
                    f"{failures} engines in a row did not start; the last: {self._start_error}; "
                    "they may need more memory (teacher.backend), run `distill doctor`"
                ) from self._start_error

    # -- engines ----------------------------------------------------------------------------------
    def _new_actor(self) -> Any:
        env = {}
        gpus = 0
        if isinstance(self._backend, VllmBackendConfig):
            from teacher_server.backends.vllm_engine import vllm_environment

            env = vllm_environment(self._backend)
            gpus = self._backend.tensor_parallel if self._project.config.cluster.teacher_gpus else 0
        options = self._cluster.options(threads=self._backend.threads, gpus=gpus, env=env)
        actor = self._cluster.ray.remote(concurrency_groups={CONTROL: 1}, **options)(TeacherWorker)
        return actor.remote(
            self._job,
            self._project.store_uri,
            provenance(),
            commit_samples=self._label.commit_samples,
            report_s=max(REPORT_S, self._backend.replicas / REPORTS_PER_S),
            log=self._project.log_for("label"),
        )

    def _give(self, engine: _Engine, number: int, requests: list[SampleRequest]) -> None:
        engine.number, engine.last = self._num_leases, LabelProgress()
        self._num_leases += 1
        label = engine.actor.label.options(num_returns="streaming")
        self._awaited[label.remote(engine.number, requests)] = ("label", number)

    def _started(self, ref: Any, number: int, engine: _Engine) -> None:
        """An engine has started, or not.

        Raises:
            DistillError: if it refuses to, for a reason that another start does not change.
        """
        ray = self._cluster.ray
        try:
            facts: EngineFacts = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            cause = unwrapped(error)
            if isinstance(cause, DistillError):
                raise cause from None
            self._did_not_start(number, error)
        except ray.exceptions.RayActorError as error:
            self._did_not_start(number, error)
        else:
            engine.node = facts.node
            self._figures.engine_began(number, time.monotonic() - facts.start_s)
            self._tell(Started(number))

    def _did_not_start(self, number: int, error: BaseException) -> None:
        self._start_error = error
        self._failed("engine did not start", number, str(error))
        self._forget(number)
        self._tell(StartFailed(number))

    def _heard(self, stream: Any, number: int, engine: _Engine) -> None:
        """An engine reports progress, has finished a lease, or died.

        Raises:
            DistillError: if it refuses to work.
        """
        ray = self._cluster.ray
        try:
            progress: LabelProgress = ray.get(next(stream))
        except StopIteration:
            del self._awaited[stream]
            self._tell(Finished(number))
        except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
            accuses = not self._lost_its_node(engine, error)
            self._died(number, "engine died", str(error), accuses=accuses)
        except ray.exceptions.RayTaskError as error:
            cause = unwrapped(error)
            if isinstance(cause, DistillError):
                raise cause from None
            self._died(number, "engine died", str(error))
        else:
            self._account(progress, engine.last)
            engine.last = progress
            self._tell(Progress(number, progress.finished_samples))

    def _let_go(self, ref: Any, number: int) -> None:
        """An engine says how many samples it lets go; if it died instead, others will tell."""
        ray = self._cluster.ray
        try:
            count: int = ray.get(ref)
        except ray.exceptions.RayActorError as error:
            accuses = not self._lost_its_node(self._engines[number], error)
            self._died(number, "engine died", str(error), accuses=accuses)
        else:
            self._tell(Released(number, count))

    def _lost_its_node(self, engine: _Engine, error: BaseException) -> bool:
        """Whether an engine is gone because its machine is, or cannot be reached."""
        ray = self._cluster.ray
        if isinstance(error, ray.exceptions.ActorUnavailableError):
            return True
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return engine.node not in alive

    # -- failures ---------------------------------------------------------------------------------
    def _died(self, number: int, reason: Reason, detail: str, *, accuses: bool = True) -> None:
        """Put back what a dead engine has left; a sample that is to blame is set aside."""
        samples = self._schedule.lease(number)
        keys = self._misses.keys(samples)
        missing = set(self._label_set.missing(keys)) - self._quarantine.keys()
        left = [sample for sample, key in zip(samples, keys, strict=True) if key in missing]
        partition = self._engines[number].number
        self._failed(reason, number, detail, partition=partition, left=len(left), accuses=accuses)
        self._figures.retried += len(left)
        self._forget(number)
        for decision in self._tell(Died(number, left, accuses)):
            if isinstance(decision, GiveUp):
                (key,) = self._misses.keys([decision.sample])
                text = f"{reason} {decision.deaths} times on this sample alone: {detail}"
                facts = {**provenance(), "backend": self._backend.type}
                self._quarantine.add(key, reason, text, facts)
                self._set_aside(1)

    def _failed(self, reason: str, number: int, detail: str, **facts: Any) -> None:
        """Note what happened to an engine."""
        self._figures.failures[reason] += 1
        self._project.metrics.add("teacher_failures_total", reason=reason)
        self._project.note(
            "teacher died", reason=reason, detail=detail[:500], engine=number, **facts
        )

    def _forget(self, number: int) -> None:
        """End an engine, and expect nothing more of it."""
        engine = self._engines.pop(number)
        self._cluster.ray.kill(engine.actor)
        self._figures.engine_ended(number, time.monotonic())
        self._awaited = {ref: of for ref, of in self._awaited.items() if of[1] != number}

    def _set_aside(self, count: int) -> None:
        self.num_bad += count
        self._figures.failures["samples set aside"] += count
        self._project.metrics.add("samples_quarantined_total", count)
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

    def _account(self, progress: LabelProgress, before: LabelProgress) -> None:
        figures, metrics = self._figures, self._project.metrics
        figures.add(progress, before)
        metrics.add("samples_labelled_total", progress.committed_samples - before.committed_samples)
        metrics.add("response_tokens_total", progress.response_tokens - before.response_tokens)
        metrics.add("teacher_forward_tokens_total", progress.forward_tokens - before.forward_tokens)
        note = figures.note(
            time.monotonic(),
            working=self._schedule.num_working,
            wanted=self._backend.replicas,
        )
        self._bars.show(
            "labelling", min(figures.finished, len(self._misses)), len(self._misses), note
        )
        if progress.bad_samples > before.bad_samples:
            self._set_aside(progress.bad_samples - before.bad_samples)
