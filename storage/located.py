"""Many samples of a view, found once: reading them later asks no index.

The loop of a training reads each of its samples once per epoch, a few at a time; looking keys up
and making one array per column and sample would take longer than decoding the labels.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from storage.errors import ShardCorruptError
from storage.held import HeldBatches
from storage.index import format_keys, parse_keys
from storage.label_batch import LabelBatch, SampleRanges
from storage.label_set import HELD_BYTES
from storage.labels.topk import long_lived
from storage.narrow import narrow
from storage.partitions import Keys
from storage.records import ShardRecord
from storage.sample_index import SampleIndex
from storage.view import LabelView

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard, and where its record batches end."""

    record: ShardRecord
    ends: Int64s


@dataclass(frozen=True, slots=True)
class _Places:
    """Where S samples lie; some bytes each."""

    set_S: npt.NDArray[np.int16]
    """Place in the view's sets of the one that each is read from."""
    shard_S: npt.NDArray[np.int32]
    """Place of its shard in the history of that set."""
    row_S: npt.NDArray[np.int32]
    """Its row in the samples file."""
    first_row_S: npt.NDArray[np.int32]
    """Its first row in the labels file."""
    indexes: list[SampleIndex]
    """Of every set, as it was."""
    shards: dict[tuple[int, int], _Shard]
    """By place of the set and place in its history; what was asked for so far."""

    def shard(self, owner: int, place: int) -> _Shard:
        """A shard by its set and its place in the history."""
        found = self.shards.get((owner, place))
        if found is None:
            record = self.indexes[owner].shard(place)
            found = _Shard(record, np.cumsum(record.batch_rows))
            self.shards[owner, place] = found
        return found


class LocatedSamples:
    """The samples of some keys in a view.

    Args:
        view: What serves them.
        keys: uint64[S, 2], from ``parse_keys``.
        prepare: What is done with every batch that was read, such as adding a column.

    Raises:
        NotLabelledError: if one is not stored.
    """

    def __init__(
        self,
        view: LabelView,
        keys: Keys,
        *,
        prepare: Callable[[LabelBatch], LabelBatch] = lambda batch: batch,
    ) -> None:
        self.view, self._prepare = view, prepare
        self._keys = keys
        self._exact = [found.key == view.spec.key for found in view.sets]
        self._held = HeldBatches(HELD_BYTES)
        self._places, num_rows_S, num_tokens_S = self._locate()
        self.num_rows_S: Int64s = num_rows_S
        """int64[S]: labelled positions of every sample."""
        self.num_tokens_S: Int64s = num_tokens_S
        """int64[S]: its response tokens."""

    def __len__(self) -> int:
        return len(self.num_rows_S)

    @property
    def keys(self) -> Keys:
        """uint64[S, 2]: the keys."""
        return self._keys

    def fork(self, view: LabelView) -> "LocatedSamples":
        """The same samples, read through another view of the same labels by another thread."""
        twin = object.__new__(LocatedSamples)
        twin.__dict__.update(self.__dict__)
        twin.view, twin._held = view, HeldBatches(self._held.max_bytes)
        return twin

    def hold(self, num_shards: int, num_bytes: int) -> None:
        """Keep so many shards of every set open, and so many bytes decoded."""
        self._held.max_bytes = num_bytes
        for found in self.view.sets:
            found.held = self._held
            found.held_shards = max(num_shards, found.held_shards)

    def ranges(self, places: Sequence[int]) -> SampleRanges:
        """The samples at these places, verified, with exactly what the view was asked for.

        Raises:
            ShardCorruptError: if the bytes differ from what was committed.
            BadLabelError: if a label cannot be one.
        """
        chosen = np.asarray(places, dtype=np.int64)
        while True:
            try:
                return self._ranges(chosen)
            except _MovedError:
                self._places, *_ = self._locate()

    def _ranges(self, chosen: Int64s) -> SampleRanges:
        where = self._places
        batch_S, place_S = np.zeros_like(chosen), np.zeros_like(chosen)
        batches: list[LabelBatch] = []
        set_S, shard_S = where.set_S[chosen], where.shard_S[chosen]
        row_S, first_row_S = where.row_S[chosen], where.first_row_S[chosen]
        for owner, number in sorted(set(zip(set_S.tolist(), shard_S.tolist(), strict=True))):
            shard = where.shard(owner, number)
            of_shard = np.flatnonzero((set_S == owner) & (shard_S == number))
            numbers = np.searchsorted(shard.ends, first_row_S[of_shard], side="right")
            for batch_number in np.unique(numbers).tolist():
                mine = of_shard[numbers == batch_number]
                found = self._batch(owner, shard, batch_number)
                at = None if found is None else found.find(row_S[mine], self._keys[chosen[mine]])
                if found is None or at is None:
                    self._refuse(owner, shard, self._keys[chosen[mine]])
                batch_S[mine], place_S[mine] = len(batches), at
                batches.append(found.batch)
                found.num_read += len(mine)
                if found.num_read >= len(found.batch):  # until the next epoch nobody asks for it
                    self._held.drop(self._name(shard, batch_number))
        return SampleRanges(batches, batch_S, place_S)

    def _refuse(self, owner: int, shard: _Shard, keys: Keys) -> NoReturn:
        raise ShardCorruptError(
            f"shard {shard.record.name} of label set {self.view.sets[owner].key} does not hold all "
            f"of the {len(keys)} samples from {format_keys(keys[:1])[0]} on where its index says; "
            "run `distill repair`"
        )

    def _batch(self, owner: int, shard: _Shard, number: int) -> "_Findable | None":
        if number == len(shard.ends):
            return None
        make = partial(self._decode, owner, shard, number)
        batch: _Findable = self._held.get(self._name(shard, number), make)
        return batch

    @staticmethod
    def _name(shard: _Shard, number: int) -> Hashable:
        # apart from what the set itself may hold of the same batch
        return shard.record.name, number, "as requested"

    def _decode(self, owner: int, shard: _Shard, number: int) -> "_Findable":
        label_set = self.view.sets[owner]
        try:
            with long_lived():
                batch = label_set.decode(shard.record, number)
        except FileNotFoundError as error:
            label_set.require_moved(shard.record, error)
            raise _MovedError from error
        if not self._exact[owner]:
            batch = narrow(batch, self.view.spec)
        return _Findable(self._prepare(batch), parse_keys(batch.keys))

    def _locate(self) -> tuple[_Places, Int64s, Int64s]:
        """Where they lie now, and their label rows and response tokens."""
        keys = self.keys
        owner_S = self.view.owners(keys)
        num_rows_S, num_tokens_S = (np.zeros(len(keys), dtype=np.int64) for _ in range(2))
        shard_S, row_S, first_row_S = (np.zeros(len(keys), dtype=np.int32) for _ in range(3))
        indexes = []
        for number, found in enumerate(self.view.sets):
            mine = np.flatnonzero(owner_S == number)
            entries = found.locate(keys[mine]).entries
            indexes.append(found.index)
            shard_S[mine], row_S[mine] = entries.shard, entries.row
            first_row_S[mine] = entries.first_row
            num_rows_S[mine], num_tokens_S[mine] = entries.num_rows, entries.num_tokens
        where = _Places(owner_S.astype(np.int16), shard_S, row_S, first_row_S, indexes, {})
        return where, num_rows_S, num_tokens_S


@dataclass(slots=True)
class _Findable:
    """A batch, the keys of its samples, and how many of them were read since it was decoded."""

    batch: LabelBatch
    keys_S2: Keys
    num_read: int = 0

    @property
    def nbytes(self) -> int:
        """Of the batch."""
        return self.batch.nbytes

    def find(self, row_M: npt.NDArray[np.integer], keys_M2: Keys) -> Int64s | None:
        """int64[M]: places of samples by their rows; None if one is another sample."""
        at = np.minimum(np.searchsorted(self.batch.rows_S, row_M), len(self.batch) - 1)
        same = (self.batch.rows_S[at] == row_M).all() and (self.keys_S2[at] == keys_M2).all()
        return at if same else None


class _MovedError(Exception):
    """A shard was replaced since its samples were found."""
