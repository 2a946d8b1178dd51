"""A cluster of engines and a store without Ray, processes or waiting: time is a number.

Engines work through their leases in commits, and die, hang, are slow, find no room, fail to start
and leave with their node as a seeded generator says. The store counts the commits of every sample.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

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

FREE = -1
TICK_S = 2.0


@dataclass(frozen=True)
class Faults:
    """What goes wrong, and how often."""

    deaths_per_minute: float = 0.0
    """Of every engine, for no reason."""
    hangs: float = 0.0
    """Share of commits after which the engine says nothing any more."""
    failed_starts: float = 0.0
    """Share of starts."""
    slow: float = 0.0
    """Share of engines that take ten times as long."""
    poisoned: frozenset[int] = frozenset()
    """Samples that kill every engine that begins them."""
    room: Sequence[tuple[float, int]] = ((0.0, 10**9),)
    """(from this second on, so many engines have room): nodes join and go."""
    stop_at: float | None = None
    """Second at which the job is asked to stop."""


@dataclass
class Engine:
    """One engine of the simulation."""

    seconds_per_sample: float
    lease: list[int] = field(default_factory=list)
    done: int = 0
    """Samples of its lease that are committed."""
    runs: bool = False
    hangs: bool = False


class Simulation:
    """One label job.

    Args:
        num_samples: Samples of the job.
        limits: Of the schedule.
        faults: What goes wrong.
        seed: Of everything that is random.
    """

    def __init__(
        self, num_samples: int, limits: ScheduleLimits, faults: Faults = Faults(), *, seed: int = 0
    ) -> None:
        self.schedule = Schedule(num_samples, limits)
        self.limits, self.faults, self.random = limits, faults, random.Random(seed)
        self.commits = np.zeros(num_samples, np.uint8)
        """How often each sample was committed."""
        self.owner = np.full(num_samples, FREE)
        """The engine that may begin each sample."""
        self.given_up: list[int] = []
        self.failed = False
        self.most_lost = self.most_engines = self.num_decisions = 0
        self.engines: dict[int, Engine] = {}
        self._waiting_for_room: dict[int, None] = {}
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0

    def run(self, *, most_s: float = 10**7) -> None:
        """Until the job is done, or has failed; a job that never ends is a failed assertion."""
        for at, _ in self.faults.room:
            self._after(at, self._room_changes)
        if self.faults.stop_at is not None:
            self._after(self.faults.stop_at, lambda: self._tell(Stop()))
        self._after(0.0, self._tick)
        while not (self.schedule.is_done or self.failed):
            self.now, _, action = heapq.heappop(self._heap)
            assert self.now < most_s, "the job does not end"
            action()

    # -- time ---------------------------------------------------------------------------------
    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.now + seconds, self._order, action))

    def _tick(self) -> None:
        self._tell(Tick(self.now))
        self._after(TICK_S, self._tick)

    def _tell(self, event: Event) -> None:
        for decision in self.schedule.on(event):
            self.num_decisions += 1
            self._obey(decision)

    def _obey(self, decision: Decision) -> None:
        match decision:
            case Hire(number):
                assert number not in self.engines
                slow = self.random.random() < self.faults.slow
                self.engines[number] = Engine(10.0 if slow else self.random.uniform(0.8, 1.2))
                self._waiting_for_room[number] = None
                assert len(self.engines) <= self.limits.engines
                self._after(0.0, self._room_changes)
            case Give(number, samples):
                engine, numbers = self.engines[number], np.asarray(samples)
                assert not engine.lease
                assert (self.owner[numbers] == FREE).all(), "a sample is with two engines"
                assert not self.commits[numbers].any(), "a stored sample is labelled again"
                self.owner[numbers] = number
                engine.lease, engine.done = list(samples), 0
                self._work(number)
            case Ask(number, count):
                self._after(0.5, lambda: self._release(number, count))
            case Kill(number, silent_s):
                assert silent_s > self.limits.deadline_s
                self._after(0.1, lambda: self._die(number))
            case GiveUp(sample):
                self.given_up.append(sample)
                self.owner[sample] = FREE
            case Fail():
                self.failed = True

    # -- engines --------------------------------------------------------------------------------
    def _room(self) -> int:
        return [room for at, room in self.faults.room if at <= self.now][-1]

    def _room_changes(self) -> None:
        """Engines that waited are placed; those whose node went are lost."""
        if len(self.engines) - len(self._waiting_for_room) <= self._room() and (
            not self._waiting_for_room
        ):
            return
        placed = [n for n in self.engines if n not in self._waiting_for_room]
        for number in placed[self._room() :]:
            self._die(number, accuses=False)
        while self._waiting_for_room and len(placed) < self._room():
            number = next(iter(self._waiting_for_room))
            del self._waiting_for_room[number]
            placed.append(number)
            self._after(self.random.uniform(20, 60), lambda number=number: self._start(number))
        self.most_engines = max(self.most_engines, len(placed))

    def _start(self, number: int) -> None:
        if number not in self.engines:
            return  # its node went
        if self.random.random() < self.faults.failed_starts:
            del self.engines[number]
            self._tell(StartFailed(number))
            self._after(0.0, self._room_changes)
            return
        self.engines[number].runs = True
        if self.faults.deaths_per_minute:
            life_s = self.random.expovariate(self.faults.deaths_per_minute / 60)
            self._after(life_s, lambda: self._die(number))
        self._tell(Started(number))

    def _begun(self, engine: Engine) -> int:
        """Samples that it works on or has finished: what is committed next, and in flight."""
        begun = engine.done + self.limits.commit_samples + self.limits.in_flight
        return min(len(engine.lease), begun)

    def _work(self, number: int) -> None:
        """Label and commit the next group."""
        engine = self.engines[number]
        size = min(self.limits.commit_samples, len(engine.lease) - engine.done)
        seconds = engine.seconds_per_sample * max(size, 1)
        if self.random.random() < self.faults.hangs:
            engine.hangs = True
        elif self.faults.poisoned.intersection(engine.lease[engine.done : self._begun(engine)]):
            self._after(seconds / 2, lambda: self._die(number))
        else:
            self._after(seconds, lambda: self._commit(number, engine, size))

    def _commit(self, number: int, engine: Engine, size: int) -> None:
        if self.engines.get(number) is not engine:
            return  # it died meanwhile
        group = engine.lease[engine.done : engine.done + size]
        assert (self.owner[group] == number).all()
        self.commits[group] += 1
        engine.done += len(group)
        self._tell(Progress(number, engine.done))
        if engine.done < len(engine.lease):
            self._work(number)
        else:
            engine.lease = []
            self._tell(Finished(number))

    def _release(self, number: int, count: int) -> None:
        engine = self.engines.get(number)
        if engine is None:
            return  # it died, and so the question did
        free = min(count, len(engine.lease) - self._begun(engine)) if engine.lease else 0
        if free:
            self.owner[engine.lease[-free:]] = FREE
            del engine.lease[-free:]
        self._tell(Released(number, free))

    def _die(self, number: int, *, accuses: bool = True) -> None:
        engine = self.engines.pop(number, None)
        if engine is None:
            return
        self._waiting_for_room.pop(number, None)
        left = [n for n in self.schedule.lease(number) if not self.commits[n]]
        lost = self._begun(engine) - engine.done if engine.lease else 0
        self.most_lost = max(self.most_lost, lost)
        self.owner[left] = FREE
        self._tell(Died(number, left, accuses))
        self._after(0.0, self._room_changes)
