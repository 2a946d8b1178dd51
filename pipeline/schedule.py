"""Which engine labels which samples: a state machine without Ray, clock or files.

News of engines goes in (``Event``), what is to be done comes out (``Decision``). Samples are the
numbers 0 to N - 1 in the order in which they are to be labelled. What nobody was given yet is one
range, so ten million samples cost no more memory than ten.

**Leases.** An engine is given a lease: some samples that it works through in their order. Leases
get smaller towards the end, so that all engines end together.

**Stealing.** When nothing waits and an engine is idle, the one that has most left to begin is asked
to let go of half of that. It answers how many samples, from the end of its lease, it lets go and
will never begin; those are given to others. So no sample is with two engines, ever.

**Deaths.** An engine works on many samples at a time, so its death accuses all that it had begun.
They are tried once more together, for most deaths are nobody's fault; then they are halved, again
and again, until a sample dies alone. An engine whose node went accuses nobody.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

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

TOGETHER = 2
"""Times that suspects die together before they are halved."""

ALONE = 3
"""Times that a sample dies alone before it is given up."""

LEASE_COMMITS = 16
"""Commits' worth of samples of the largest lease: long enough to keep an engine full."""

START_FAILURES = 3
"""Engines that fail to start one after the other, while none works, before the job fails."""

RETRY_S = (1.0, 60.0)
"""Seconds after the first failed start until the next; doubled each time, up to the second."""


@dataclass(frozen=True, slots=True)
class ScheduleLimits:
    """What the schedule must respect."""

    engines: int
    """Most engines at the same time. Those that find no room yet keep nobody waiting."""
    commit_samples: int
    """Finished samples of an engine that may wait for their commit."""
    in_flight: int
    """Samples that an engine holds at the same time."""
    deadline_s: float
    """An engine that works and is silent for longer hangs."""

    @property
    def most(self) -> int:
        """Samples of the largest lease."""
        return self.commit_samples * LEASE_COMMITS

    @property
    def least(self) -> int:
        """Samples of the smallest lease that is cut: it still fills an engine."""
        return min(self.most, max(self.commit_samples, self.in_flight))


@dataclass(slots=True)
class _Piece:
    """Samples that wait because their engine died or let go of them."""

    samples: Sequence[int]
    deaths: int = 0
    """Times that an engine died on just these samples."""


@dataclass(slots=True)
class _Lease:
    """Samples that an engine has."""

    samples: Sequence[int]
    deaths: int
    heard: float
    """When the engine was last heard of."""
    finished: int = 0
    num_asked: int = 0
    """Samples that it was asked to let go of and has not answered."""
    is_begun: bool = False
    """Whether it answered that it has begun all of them."""
    has_finished: bool = False
    """Whether only the answer is missing."""
    is_killed: bool = False


class Schedule:
    """The state of one label job.

    Args:
        num_samples: N; samples are the numbers from 0 to N - 1.
        limits: What must be respected.
    """

    def __init__(self, num_samples: int, limits: ScheduleLimits) -> None:
        self.num_samples, self.limits = num_samples, limits
        self.deaths = 0
        """Engines that died at work."""
        self.steals = 0
        """Times that an engine let go of samples for others."""
        self._num_fresh = num_samples
        """Samples at the end of the job that nobody was given yet."""
        self._returned: deque[_Piece] = deque()
        self._leases: dict[int, _Lease] = {}
        self._starting: set[int] = set()
        self._idle: list[int] = []
        self._now = self._hire_at = 0.0
        self._num_hired = self._num_asked = 0
        self._failures = 0
        """Starts that failed since a sample was finished."""
        self._nothing_to_steal = False
        self.is_stopped = False
        """Whether nothing more is to be begun."""

    # -- what can be asked ------------------------------------------------------------------------
    @property
    def is_done(self) -> bool:
        """Whether nothing waits and nobody works."""
        return not self._leases and not self.num_waiting

    @property
    def num_waiting(self) -> int:
        """Samples that no engine has and that are to be labelled."""
        if self.is_stopped:
            return 0
        return self._num_fresh + sum(len(piece.samples) for piece in self._returned)

    @property
    def num_working(self) -> int:
        """Engines that have a lease."""
        return len(self._leases)

    @property
    def num_starting(self) -> int:
        """Engines that start, or wait for room in the cluster."""
        return len(self._starting)

    def lease(self, engine: int) -> Sequence[int]:
        """The samples that an engine has, without what it let go; empty if it has none."""
        lease = self._leases.get(engine)
        return () if lease is None else lease.samples

    # -- events -----------------------------------------------------------------------------------
    def on(self, event: Event) -> list[Decision]:
        """Take up what happened; returns what is to be done about it, in order."""
        decisions: list[Decision] = []
        match event:
            case Tick(now):
                self._now = now
                decisions += self._hung()
            case Started(engine):
                self._starting.discard(engine)
                self._idle.append(engine)
            case StartFailed(engine):
                decisions += self._start_failed(engine)
            case Progress(engine, finished):
                self._heard(engine, finished)
            case Finished(engine):
                lease = self._leases[engine]
                lease.has_finished = True
                if not lease.num_asked:
                    self._becomes_idle(engine)
            case Released(engine, count):
                self._released(engine, count)
            case Died(engine, left, accuses):
                decisions += self._died(engine, left, accuses=accuses)
            case Stop():
                self.is_stopped = True
        return [*decisions, *self._assign()]

    def _heard(self, engine: int, finished: int) -> None:
        lease = self._leases[engine]
        lease.heard = self._now
        if finished > lease.finished:
            lease.finished = finished
            self._failures = 0

    def _released(self, engine: int, count: int) -> None:
        lease = self._leases[engine]
        lease.is_begun = count < lease.num_asked
        lease.num_asked = 0
        self._num_asked -= 1
        self._nothing_to_steal = False
        if count:
            kept = len(lease.samples) - count
            self._returned.appendleft(_Piece(lease.samples[kept:]))
            lease.samples = lease.samples[:kept]
            self.steals += not self.is_stopped
        if lease.has_finished:
            self._becomes_idle(engine)

    def _becomes_idle(self, engine: int) -> None:
        del self._leases[engine]
        self._idle.append(engine)

    def _start_failed(self, engine: int) -> list[Decision]:
        self._starting.discard(engine)
        self._failures += 1
        first, longest = RETRY_S
        self._hire_at = self._now + min(longest, first * 2.0 ** (self._failures - 1))
        none_works = not self._leases and not self._idle
        return [Fail(self._failures)] if none_works and self._failures >= START_FAILURES else []

    def _died(self, engine: int, left: Sequence[int], *, accuses: bool) -> list[Decision]:
        if engine in self._starting:
            return self._start_failed(engine) if accuses else self._lost(engine)
        lease = self._leases.pop(engine, None)
        if lease is None:
            return self._lost(engine)
        self._num_asked -= lease.num_asked > 0
        self.deaths += 1
        if not accuses:
            self._return(left, lease.deaths)
            return []
        # what it had pulled: what was in flight, and what was finished but not committed
        begun = self.limits.in_flight + self.limits.commit_samples
        suspects, rest = left[:begun], left[begun:]
        self._return(rest, 0)
        deaths = lease.deaths + 1
        if len(suspects) == 1 and deaths >= ALONE:
            return [GiveUp(suspects[0], deaths)]
        if len(suspects) > 1 and deaths >= TOGETHER:
            half = len(suspects) // 2
            self._return(suspects[half:], TOGETHER - 1)
            self._return(suspects[:half], TOGETHER - 1)
        else:
            self._return(suspects, deaths)
        return []

    def _lost(self, engine: int) -> list[Decision]:
        """An engine without work is gone."""
        self._starting.discard(engine)
        if engine in self._idle:
            self._idle.remove(engine)
        return []

    def _return(self, samples: Sequence[int], deaths: int) -> None:
        if samples:
            self._returned.appendleft(_Piece(samples, deaths))

    def _hung(self) -> list[Decision]:
        found: list[Decision] = []
        for engine, lease in self._leases.items():
            silent = self._now - lease.heard
            if silent > self.limits.deadline_s and not lease.is_killed:
                lease.is_killed = True
                found.append(Kill(engine, silent))
        return found

    # -- assignments ------------------------------------------------------------------------------
    def _assign(self) -> list[Decision]:
        if self.is_stopped:
            return [
                self._ask(engine, len(lease.samples))
                for engine, lease in self._leases.items()
                if self._may_be_asked(lease)
            ]
        decisions: list[Decision] = []
        while self._idle and (self._returned or self._num_fresh):
            engine, piece = self._idle.pop(), self._take()
            self._leases[engine] = _Lease(piece.samples, piece.deaths, self._now)
            self._nothing_to_steal = False
            decisions.append(Give(engine, piece.samples))
        while len(self._idle) > self._num_asked and not self._nothing_to_steal:
            decisions += self._steal()
        return [*decisions, *self._hire()]

    def _take(self) -> _Piece:
        """The next samples for an engine; those that came back are first."""
        if self._returned:
            return self._returned.popleft()
        # half of an even share: what is left for later evens out engines of different speed
        engines = self.limits.engines
        share = self._num_fresh if engines == 1 else _ceil(self._num_fresh, 2 * engines)
        commits = _ceil(max(share, self.limits.least), self.limits.commit_samples)
        size = min(self._num_fresh, commits * self.limits.commit_samples, self.limits.most)
        start = self.num_samples - self._num_fresh
        self._num_fresh -= size
        return _Piece(range(start, start + size))

    def _steal(self) -> list[Decision]:
        """Ask the engine that has most left to begin for half of it."""

        def unbegun(engine: int) -> int:
            lease = self._leases[engine]
            if lease.deaths or not self._may_be_asked(lease):  # suspects stay together
                return 0
            return len(lease.samples) - lease.finished - self.limits.in_flight

        victim = max(self._leases, key=unbegun, default=None)
        if victim is None or unbegun(victim) < 2:
            self._nothing_to_steal = True
            return []
        return [self._ask(victim, unbegun(victim) // 2)]

    def _may_be_asked(self, lease: _Lease) -> bool:
        closed = lease.num_asked or lease.is_begun or lease.has_finished or lease.is_killed
        return bool(lease.samples) and not closed

    def _ask(self, engine: int, count: int) -> Ask:
        self._leases[engine].num_asked = count
        self._num_asked += 1
        return Ask(engine, count)

    def _hire(self) -> list[Decision]:
        """As many engines as there is work for."""
        if self._now < self._hire_at:
            return []
        pieces = len(self._returned) + _ceil(self._num_fresh, self.limits.least)
        wanted = min(self.limits.engines, len(self._leases) + pieces)
        missing = wanted - len(self._leases) - len(self._idle) - len(self._starting)
        hired: list[Decision] = []
        for _ in range(missing):
            hired.append(Hire(self._num_hired))
            self._starting.add(self._num_hired)
            self._num_hired += 1
        return hired


def _ceil(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)
