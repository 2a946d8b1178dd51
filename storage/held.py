"""What a reader keeps in memory: the last used batches, up to a number of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol


class HasBytes(Protocol):
    """A record batch, of Arrow or decoded."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        ...


class HeldBatches:
    """The last used batches.

    Args:
        max_bytes: Batches beyond this size in total are let go, the longest unused first; the last
            used one stays whatever its size.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._batches: OrderedDict[Hashable, HasBytes] = OrderedDict()
        self._num_bytes = 0

    def get(self, name: Hashable, make: Callable[[], HasBytes]) -> Any:
        """The batch of a name, of the type that ``make`` returns; made where it is not held."""
        found = self._batches.get(name)
        if found is not None:
            self._batches.move_to_end(name)
            return found
        made = self._batches[name] = make()
        self._num_bytes += made.nbytes
        while self._num_bytes > self.max_bytes and len(self._batches) > 1:
            _, oldest = self._batches.popitem(last=False)
            self._num_bytes -= oldest.nbytes
        return made

    def drop(self, name: Hashable) -> None:
        """Let a batch go, if it is held: it is not needed soon."""
        if name in self._batches:
            self._num_bytes -= self._batches.pop(name).nbytes
