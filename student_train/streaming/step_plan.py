"""What every optimiser step of a training consists of, on every rank.

A plan is made from lengths before the first step, and holds some bytes per sample. Together with
the number of a step it *is* the position in the data: there is nothing else to save, and a resume
on another world size goes on with the same steps.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from student_train.config import BatchConfig
from student_train.streaming.order import PlacedRow, epoch_rows, group_rows
from student_train.streaming.packing import pack

Int64s = npt.NDArray[np.int64]

MicroBatchPlan = tuple[tuple[int, tuple[int, ...]], ...]
"""Samples that go through the model at once: for every part of a row, whose turn it was, and the
places of its samples in the selection."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimiser step over all ranks."""

    rows: tuple[PlacedRow, ...]
    """In order."""
    num_supervised: int
    """Label rows of the whole step over all ranks: the one normaliser of its loss."""
    num_tokens: int
    """Prompt and response tokens of the step, padding excluded."""

    @property
    def samples(self) -> list[int]:
        """Places in the selection of all samples, in order."""
        return [sample for row in self.rows for sample in row.samples]


class TrainingPlan:
    """All optimiser steps of a training.

    Args:
        members: The samples of every epoch: places in the selection, sorted by sample key.
        num_rows_S: Label rows of every sample of the selection.
        num_tokens_S: Prompt and response tokens of every sample.
        batch: Sizes.
        seed: Of the training.
    """

    def __init__(
        self,
        members: Sequence[Int64s],
        num_rows_S: Int64s,
        num_tokens_S: Int64s,
        batch: BatchConfig,
        *,
        seed: int,
    ) -> None:
        self._batch, self._num_rows_S, self._num_tokens_S = batch, num_rows_S, num_tokens_S
        samples: list[int] = []
        row_ends, row_places, step_ends = [0], [], [0]
        for epoch, members_N in enumerate(members):
            rows = epoch_rows(members_N, num_tokens_S, batch, seed=seed, epoch=epoch)
            for group in group_rows(rows, num_tokens_S, batch.tokens):
                for row in group:
                    samples += row.samples
                    row_ends.append(len(samples))
                    row_places.append(row.place)
                step_ends.append(len(row_places))
        self._samples = np.array(samples, dtype=np.int64)
        self._row_ends = np.array(row_ends, dtype=np.int64)
        self._row_places = np.array(row_places, dtype=np.int32)
        self._step_ends = np.array(step_ends, dtype=np.int64)

    @property
    def lanes(self) -> int:
        """Lanes that take turns."""
        return self._batch.lanes

    @property
    def digest(self) -> str:
        """Of all steps; differs where a sample is in another row, or a row in another step."""
        state = hashlib.sha256()
        for part in (self._samples, self._row_ends, self._row_places, self._step_ends):
            state.update(part.tobytes())
        return state.hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._step_ends) - 1

    def step(self, number: int) -> StepPlan:
        """The step of this number, from 0."""
        first, last = self._step_ends[number : number + 2].tolist()
        rows = tuple(
            PlacedRow(
                tuple(self._samples[self._row_ends[row] : self._row_ends[row + 1]].tolist()),
                int(self._row_places[row]),
            )
            for row in range(first, last)
        )
        members = self._samples[self._row_ends[first] : self._row_ends[last]]
        return StepPlan(
            rows,
            num_supervised=int(self._num_rows_S[members].sum()),
            num_tokens=int(self._num_tokens_S[members].sum()),
        )

    def rounds(self, number: int, rank: int, world_size: int) -> list[MicroBatchPlan | None]:
        """A rank's micro-batches of a step; None where only other ranks have one left.

        All ranks get lists of the same length, so that they accumulate and reduce together.
        """
        step = self.step(number)
        of_ranks = [
            self._micro_batches([row for row in step.rows if row.place % world_size == other])
            for other in range(world_size)
        ]
        mine: list[MicroBatchPlan | None] = [*of_ranks[rank]]
        return mine + [None] * (max(map(len, of_ranks)) - len(mine))

    def filler(self, number: int) -> tuple[int, tuple[int, ...]]:
        """What a rank computes, and does not count, while only others have a micro-batch left.

        The shortest sample of the step, with whose turn it was.
        """
        members = [(row.place, sample) for row in self.step(number).rows for sample in row.samples]
        place, sample = min(members, key=lambda member: int(self._num_tokens_S[member[1]]))
        return place, (sample,)

    def _micro_batches(self, rows: Sequence[PlacedRow]) -> list[MicroBatchPlan]:
        micro_tokens = self._batch.micro_tokens
        if self._batch.packing == "padded":
            places = {sample: row.place for row in rows for sample in row.samples}
            samples = [sample for row in rows for sample in row.samples]
            groups = split_by_padded_size(samples, self._num_tokens_S, micro_tokens)
            return [tuple((places[sample], (sample,)) for sample in group) for group in groups]
        pieces = [(row.place, piece) for row in rows for piece in self._pieces(row)]
        sizes = [int(self._num_tokens_S[list(piece)].sum()) for _, piece in pieces]
        together = pack(sizes, micro_tokens, "first_fit")
        return [tuple(pieces[number] for number in numbers) for numbers in together]

    def _pieces(self, row: PlacedRow) -> Iterator[tuple[int, ...]]:
        """A row, cut between samples where it is larger than a micro-batch."""
        current: list[int] = []
        used = 0
        for sample in row.samples:
            size = int(self._num_tokens_S[sample])
            if current and used + size > self._batch.micro_tokens:
                yield tuple(current)
                current, used = [], 0
            current.append(sample)
            used += size
        yield tuple(current)


def split_by_padded_size(
    indices: Sequence[int], num_tokens_S: Int64s, micro_tokens: int
) -> Iterator[tuple[int, ...]]:
    """Micro-batches of samples of like length whose padded size stays within ``micro_tokens``."""
    by_length = sorted(indices, key=lambda index: (-int(num_tokens_S[index]), index))
    current: list[int] = []
    for index in by_length:
        longest = int(num_tokens_S[current[0]]) if current else 0
        if current and longest * (len(current) + 1) > micro_tokens:
            yield tuple(current)
            current = []
        current.append(index)
    if current:
        yield tuple(current)
