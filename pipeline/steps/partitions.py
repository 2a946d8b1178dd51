"""Which engine gets which samples, and how the one that kills engines is found.

An engine works on many samples at a time, so its death accuses all that it had begun. They are
tried once more together, for most deaths are nobody's fault; then they are halved, again and
again, until a sample dies alone.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from storage.selection import SampleRequest

TOGETHER = 2
"""Times that suspects die together before they are halved."""

ALONE = 3
"""Times that a sample dies alone before it is given up."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Samples that one engine is given at once."""

    requests: Sequence[SampleRequest]
    deaths: int = 0
    """Times that an engine died on just these samples."""


class PartitionQueue:
    """Partitions that wait for an engine.

    Args:
        requests: All samples, in the order in which they are to be labelled.
        size: Samples of a partition.
    """

    def __init__(self, requests: Sequence[SampleRequest], size: int) -> None:
        starts = range(0, len(requests), size)
        self._waiting = deque(Partition(requests[start : start + size]) for start in starts)

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> Partition:
        """The next partition; those under suspicion come first."""
        return self._waiting.popleft()

    def clear(self) -> None:
        """Give out nothing more."""
        self._waiting.clear()

    def died(
        self, partition: Partition, left: Sequence[SampleRequest], begun: int
    ) -> SampleRequest | None:
        """Take back what an engine that died has left undone.

        Args:
            partition: What it was given.
            left: Samples of it that are not stored, in their order.
            begun: How many of these, from the front, it may have begun.

        Returns:
            A sample to be given up: it alone killed engines again and again.
        """
        suspects, rest = left[:begun], left[begun:]
        if rest:
            self._waiting.appendleft(Partition(rest))
        deaths = partition.deaths + 1
        if len(suspects) == 1 and deaths >= ALONE:
            return suspects[0]
        if len(suspects) > 1 and deaths >= TOGETHER:
            half = len(suspects) // 2
            for part in (suspects[half:], suspects[:half]):
                self._waiting.appendleft(Partition(part, TOGETHER - 1))
        elif suspects:
            self._waiting.appendleft(Partition(suspects, deaths))
        return None
