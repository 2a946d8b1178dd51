"""The order of samples in an epoch: a function of seed, epoch and selection alone.

**Lanes.** The samples of an epoch, sorted by their keys, are cut into lanes of equal size. Shards
hold samples in the order of their keys, so a lane reads its shards from one end to the other and
each record batch is decoded once, on one rank, whatever was compacted or added meanwhile. Keys are
digests: neighbours in this order have nothing in common, except for the answers to one prompt.

**Windows.** A lane begins at a place that is drawn anew for every epoch, goes round, and is cut
into windows of some thousand tokens. Samples of a window are shuffled and packed into rows, and the
rows shuffled. That bounds what is held in memory: one window of every lane of the rank.

**Turns.** Lanes take turns, in an order that is drawn for every epoch: the first row of each, the
second of each, and so on. A rank owns every ``world_size``-th of these places, so that the rows of
a step are spread evenly over ranks, and their order does not depend on how many there are.

Randomness is counter-based (Philox): the numbers of a lane depend on seed, epoch and lane, and not
on what was drawn before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from student_train.config import BatchConfig
from student_train.streaming.packing import pack

Int64s = npt.NDArray[np.int64]

ROWS_PER_STEP = 8
"""A row holds at most this part of a step's tokens, so that several ranks have work in it."""


@dataclass(frozen=True, slots=True)
class PlacedRow:
    """Samples that stay together, on one rank."""

    samples: tuple[int, ...]
    """Places in the selection."""
    place: int
    """Whose turn it was: the rank is ``place % world_size``."""


def epoch_rows(
    members_N: Int64s, num_tokens_S: Int64s, batch: BatchConfig, *, seed: int, epoch: int
) -> list[PlacedRow]:
    """All rows of an epoch, in the order in which they are trained.

    Args:
        members_N: Places in the selection of the epoch's samples, sorted by sample key.
        num_tokens_S: Prompt and response tokens of every sample of the selection.
        batch: Lanes, windows and rows.
        seed: Of the training.
        epoch: From 0.
    """
    bounds = _lane_bounds(num_tokens_S[members_N], batch.lanes)
    places = _generator(seed, epoch, 0).permutation(batch.lanes)
    capacity = max(1, min(batch.row_tokens, batch.tokens // ROWS_PER_STEP))
    turns: list[tuple[int, int, tuple[int, ...]]] = []
    for lane in range(batch.lanes):
        generator = _generator(seed, epoch, 1 + lane)
        members = members_N[bounds[lane] : bounds[lane + 1]]
        rows = _lane_rows(members, num_tokens_S, batch, capacity, generator)
        turns += [(turn, int(places[lane]), row) for turn, row in enumerate(rows)]
    return [PlacedRow(row, place) for _, place, row in sorted(turns)]


def group_rows(
    rows: Sequence[PlacedRow], num_tokens_S: Int64s, tokens: int
) -> list[tuple[PlacedRow, ...]]:
    """Consecutive rows in groups of at most ``tokens``; a longer row is a group of its own."""
    groups: list[list[PlacedRow]] = []
    used = 0
    for row in rows:
        size = int(num_tokens_S[list(row.samples)].sum())
        if not groups or used + size > tokens:
            groups.append([])
            used = 0
        groups[-1].append(row)
        used += size
    return [tuple(group) for group in groups]


def draw_members(
    source_S: Int64s, weights: Sequence[float], *, seed: int, epoch: int, key_order_S: Int64s
) -> Int64s:
    """Which samples an epoch has, by the weights of their sources; in the order of their keys.

    A weight is a number of passes: 1 takes every sample once, 0.5 a random half that is drawn
    anew for every epoch, 2.5 every sample twice and a random half once more.

    Args:
        source_S: Number of the source of every sample of the selection.
        weights: Of every source.
        seed: Of the training.
        epoch: From 0.
        key_order_S: The places of the selection, sorted by sample key.
    """
    copies_S = np.zeros(len(source_S), dtype=np.int64)
    for number, weight in enumerate(weights):
        mine = key_order_S[source_S[key_order_S] == number]
        whole = int(weight)
        copies_S[mine] = whole
        generator = np.random.Generator(
            np.random.Philox(key=[seed, epoch], counter=[0, 0, 1, number])
        )
        extra = round((weight - whole) * len(mine))
        copies_S[generator.permutation(mine)[:extra]] += 1
    return np.repeat(key_order_S, copies_S[key_order_S])


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]))


def _lane_bounds(num_tokens_N: Int64s, lanes: int) -> Int64s:
    """int64[lanes + 1]: where lanes begin and end, with about the same tokens in each."""
    ends_N = np.cumsum(num_tokens_N)
    total = int(ends_N[-1]) if len(ends_N) else 0
    middles_N = ends_N - num_tokens_N / 2  # a sample belongs where its middle token lies
    return np.searchsorted(middles_N, np.arange(lanes + 1) * (total / lanes)).astype(np.int64)


def _lane_rows(
    members: Int64s,
    num_tokens_S: Int64s,
    batch: BatchConfig,
    capacity: int,
    generator: np.random.Generator,
) -> Iterator[tuple[int, ...]]:
    """The rows of one lane, window after window."""
    if len(members) == 0:
        return
    members = np.roll(members, int(generator.integers(len(members))))
    # without rows to fill, samples that share a step are the same as with them
    how = "first_fit" if batch.packing == "padded" else batch.packing
    for window in _windows(members, num_tokens_S, batch.window_tokens):
        shuffled = generator.permutation(window)
        rows = pack(num_tokens_S[shuffled].tolist(), capacity, how)
        for number in generator.permutation(len(rows)).tolist():
            yield tuple(shuffled[rows[number]].tolist())


def _windows(members: Int64s, num_tokens_S: Int64s, tokens: int) -> Iterator[Int64s]:
    """Consecutive members of about so many tokens, at least one each."""
    before = np.cumsum(num_tokens_S[members]) - num_tokens_S[members]
    starts = np.flatnonzero(np.diff(before // tokens, prepend=-1))
    yield from np.split(members, starts[1:])
