"""What a schedule of engines is told, and what it answers; see :mod:`pipeline.schedule`."""

from collections.abc import Sequence
from dataclasses import dataclass


# -- events -----------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""

    now: float
    """Seconds since any fixed moment; never less than before."""


@dataclass(frozen=True, slots=True)
class Started:
    """An engine is ready."""

    engine: int


@dataclass(frozen=True, slots=True)
class StartFailed:
    """An engine could not be started; it is gone."""

    engine: int


@dataclass(frozen=True, slots=True)
class Progress:
    """An engine is alive."""

    engine: int
    finished: int
    """Samples of its lease that it has finished, committed or not."""


@dataclass(frozen=True, slots=True)
class Finished:
    """An engine committed, or set aside, all of its lease but what it let go."""

    engine: int


@dataclass(frozen=True, slots=True)
class Released:
    """An engine that was asked let go of the last samples of its lease; it never begins them."""

    engine: int
    count: int
    """How many; none where it had begun all of them."""


@dataclass(frozen=True, slots=True)
class Died:
    """An engine is gone."""

    engine: int
    left: Sequence[int]
    """Samples of its lease that are neither stored nor set aside, in the lease's order."""
    accuses: bool = True
    """Whether a sample may be to blame: False where its node went."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Nothing more is to be begun."""


Event = Tick | Started | StartFailed | Progress | Finished | Released | Died | Stop


# -- decisions --------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Hire:
    """Start an engine; answered by ``Started``, ``StartFailed`` or ``Died``, whenever that is."""

    engine: int


@dataclass(frozen=True, slots=True)
class Give:
    """Give an engine that has no work a lease; answered by ``Finished`` or ``Died``."""

    engine: int
    samples: Sequence[int]


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask an engine to let go of samples; answered by ``Released`` or ``Died``."""

    engine: int
    count: int
    """The last so many of its lease, as far as it has not begun them."""


@dataclass(frozen=True, slots=True)
class Kill:
    """End an engine that hangs; answered by ``Died``."""

    engine: int
    silent_s: float
    """How long nothing was heard of it."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Set a sample aside: it alone killed engines again and again."""

    sample: int
    deaths: int


@dataclass(frozen=True, slots=True)
class Fail:
    """Give up the job: engines do not start."""

    failures: int


Decision = Hire | Give | Ask | Kill | GiveUp | Fail
