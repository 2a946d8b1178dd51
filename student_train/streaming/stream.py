"""Micro-batches of a rank, made ahead by threads while the model works.

The order is fixed before anything is read: threads only decide when a sample is ready. Every lane
is read by one thread, so a batch of labels is decoded once, and what is ready and not yet used is
bounded by the number of micro-batches made ahead.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np

from storage.errors import LabelStoreError
from storage.label_batch import SampleRanges, join
from student_train.config import LoaderConfig
from student_train.streaming.reader import LabelReader, MicroBatch
from student_train.streaming.step_plan import MicroBatchPlan, TrainingPlan

Collate = Callable[[SampleRanges], MicroBatch]
"""From the samples of a micro-batch, in their order, to the batch."""

WAIT_S = 0.2
"""How often a thread that waits for room looks whether it should end."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """What ended the reading, instead of a batch."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class _End:
    """After the last batch."""


@dataclass(frozen=True, slots=True)
class _Reads:
    """What threads are reading for one micro-batch."""

    by_worker: dict[int, Future[SampleRanges]]
    order: list[int]
    """Which of them has the next sample, sample by sample."""

    def result(self) -> SampleRanges:
        """The samples in the order of the micro-batch."""
        found = join([self.by_worker[worker].result() for worker in sorted(self.by_worker)])
        # samples of a thread lie one after the other in what it found
        by_thread = np.argsort(np.array(self.order), kind="stable")
        return found.take(np.argsort(by_thread))


Item = MicroBatch | _Failure | _End


class BatchStream:
    """The micro-batches of one rank, in order; a context manager that ends its threads.

    Args:
        reader: The labels; from here on it belongs to the stream.
        plan: Of the training.
        first_step: Where to begin.
        rank_of_world: This rank and the number of ranks.
        collate: Makes a batch of samples.
        loader: Threads, batches made ahead and memory.
    """

    def __init__(
        self,
        reader: LabelReader,
        plan: TrainingPlan,
        *,
        first_step: int,
        rank_of_world: tuple[int, int],
        collate: Collate,
        loader: LoaderConfig,
    ) -> None:
        self.waited_s = 0.0
        """Seconds that :meth:`next` has waited for a batch."""
        self._plan, self._collate = plan, collate
        self._first_step, (self._rank, self._world_size) = first_step, rank_of_world
        self._readers = [reader, *(reader.fork() for _ in range(loader.workers - 1))]
        lanes = -(-plan.lanes // self._world_size)
        for each in self._readers:
            each.hold(-(-lanes // loader.workers), loader.memory_mib * 2**20 // len(self._readers))
        self._pools = [ThreadPoolExecutor(1, f"labels-{n}") for n in range(loader.workers)]
        self._prefetch = loader.prefetch
        self._ready: queue.Queue[Item] = queue.Queue(loader.prefetch)
        self._closed = threading.Event()
        self._assembler = threading.Thread(target=self._run, name="batches", daemon=True)
        self._assembler.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; a read that is under way is finished first."""
        self._closed.set()
        self._assembler.join()
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def next(self) -> MicroBatch:
        """The next micro-batch; one that does not count where only other ranks have more.

        Raises:
            LabelStoreError: of the label that could not be read; it says before which step.
            StopIteration: after the last one.
        """
        started = time.perf_counter()
        item = self._ready.get()
        self.waited_s += time.perf_counter() - started
        if isinstance(item, _Failure | _End):
            self._ready.put(item)  # the same answer to whoever asks again
            raise item.error if isinstance(item, _Failure) else StopIteration
        return item

    # -- in threads -------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            for item in self._batches():
                if not self._offer(item):
                    return
            self._offer(_End())
        except BaseException as error:  # noqa: BLE001 - carried to the thread that asks for batches
            self._offer(_Failure(error))

    def _offer(self, item: Item) -> bool:
        """Wait for room; False if the stream was closed meanwhile."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=WAIT_S)
            except queue.Full:
                continue
            return True
        return False

    def _batches(self) -> Iterator[MicroBatch]:
        """Batches in order; reading of the next ones is under way."""
        asked: deque[tuple[int, bool, _Reads]] = deque()
        for step in range(self._first_step, len(self._plan)):
            for found in self._plan.rounds(step, self._rank, self._world_size):
                groups = found or (self._plan.filler(step),)
                asked.append((step, found is not None, self._ask(groups)))
                if len(asked) > self._prefetch:
                    yield self._assemble(*asked.popleft())
        while asked:
            yield self._assemble(*asked.popleft())

    def _ask(self, groups: MicroBatchPlan) -> _Reads:
        """Let every lane's thread read its samples; one look-up for all of a thread is cheaper."""
        by_worker: dict[int, list[int]] = {}
        order = []
        for place, samples in groups:
            worker = place // self._world_size % len(self._pools)
            by_worker.setdefault(worker, []).extend(samples)
            order += [worker] * len(samples)
        reads = {
            worker: self._pools[worker].submit(self._readers[worker].ranges, samples)
            for worker, samples in by_worker.items()
        }
        return _Reads(reads, order)

    def _assemble(self, step: int, counts: bool, reads: _Reads) -> MicroBatch:
        try:
            return replace(self._collate(reads.result()), counts=counts)
        except LabelStoreError as error:
            raise type(error)(
                f"{error}; it is needed for step {step + 1} of {len(self._plan)}. The training "
                "goes on from its last checkpoint when it is started again"
            ) from error
