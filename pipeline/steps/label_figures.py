"""What labelling costs and how it goes: shown while it runs, noted when it ends."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from teacher_server.label import LabelProgress


@dataclass(slots=True)
class LabelFigures:
    """Figures of one label job; times are seconds on the caller's clock."""

    num_samples: int
    """To be labelled."""
    began: float
    engine_hour_cost: float | None
    """What an engine costs per hour, None where nobody said."""
    finished: int = 0
    """Samples that were finished; those of an engine that died before it committed count twice."""
    response_tokens: int = 0
    forward_tokens: int = 0
    retried: int = 0
    """Samples that were given out again because their engine died."""
    failures: Counter[str] = field(default_factory=Counter)
    """Engines that died, hung, or did not start, and samples set aside, by what happened."""
    _paid_s: float = 0.0
    _engines: dict[int, float] = field(default_factory=dict)

    def add(self, progress: LabelProgress, before: LabelProgress) -> None:
        """An engine reported more than it had reported before."""
        self.finished += progress.finished_samples - before.finished_samples
        self.response_tokens += progress.response_tokens - before.response_tokens
        self.forward_tokens += progress.forward_tokens - before.forward_tokens

    def engine_began(self, engine: int, at: float) -> None:
        """An engine took its place at this time."""
        self._engines[engine] = at

    def engine_ended(self, engine: int, at: float) -> None:
        """An engine left its place; one that never had any costs nothing."""
        self._paid_s += at - self._engines.pop(engine, at)

    def engine_seconds(self, now: float) -> float:
        """Seconds of all engines together."""
        return self._paid_s + sum(now - began for began in self._engines.values())

    def cost(self, now: float) -> float | None:
        """What the engines cost so far, in the currency of the setting."""
        if self.engine_hour_cost is None:
            return None
        return self.engine_seconds(now) / 3600 * self.engine_hour_cost

    def note(self, now: float, *, working: int, wanted: int) -> str:
        """One line: speed, engines, time to go, cost and failures."""
        seconds = max(1e-9, now - self.began)
        parts = [f"{self.response_tokens / seconds:.0f} tok/s", f"{working} of {wanted} engines"]
        if 0 < self.finished < self.num_samples:
            left_s = (self.num_samples - self.finished) * seconds / self.finished
            parts.append(f"{_duration(left_s)} left")
        cost = self.cost(now)
        if cost is not None:
            parts.append(f"cost {cost:.2f}")
        parts += [f"{count} {what}" for what, count in sorted(self.failures.items())]
        return ", ".join(parts)

    def facts(self, now: float) -> dict[str, Any]:
        """What is noted of the job when it ends, however it ends."""
        seconds, cost = max(1e-9, now - self.began), self.cost(now)
        return {
            "teacher_forward_tokens": self.forward_tokens,
            "response_tokens": self.response_tokens,
            "tokens_per_second": round(self.response_tokens / seconds, 1),
            "engine_seconds": round(self.engine_seconds(now), 2),
            **({} if cost is None else {"cost": round(cost, 4)}),
            "failures": dict(sorted(self.failures.items())),
            "retried_samples": self.retried,
        }


def _duration(seconds: float) -> str:
    """Such as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
