"""The samples of a label set page by page, without reading labels.

Sizes come from the records of the shards, a page from the samples file of the shard in which it
lies. So the first page of a large remote set costs a few requests, however many samples follow.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from storage.errors import ShardCorruptError
from storage.ipc import ArrowFile
from storage.label_set import LabelSet
from storage.records import ShardRecord
from storage.shard import SAMPLES_BATCH_ROWS

PREVIEW_TOKENS = 48
"""Last tokens of a prompt that a list shows: first ones are often the same for all."""

HELD_FILES = 16
"""Samples files that stay open."""

COLUMNS = ("sample_key", "num_rows", "num_tokens", "sample_index", "finish_reason", "prompt_ids")


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample in a list."""

    key: str
    num_rows: int
    """Labelled positions."""
    num_tokens: int
    """Response tokens."""
    sample_index: int
    finish_reason: str
    prompt_tail: tuple[int, ...]
    """Last tokens of its prompt."""


class Listing:
    """Samples of a label set in the order of their commits, as of the last refresh.

    Args:
        label_set: The set.
    """

    def __init__(self, label_set: LabelSet) -> None:
        self._label_set = label_set
        self._files: OrderedDict[str, ArrowFile] = OrderedDict()

    def num_samples(self, *, fresh: bool = True) -> int:
        """Samples of all shards; copies that are not served count until ``compact`` drops them."""
        return sum(shard.num_samples for shard in self._label_set.live_shards(fresh=fresh))

    def page(self, start: int, count: int) -> list[Entry]:
        """The samples at ``start`` and behind; fewer than ``count`` where copies are left out.

        Args:
            start: Place of the first one, from 0.
            count: How many places to look at.
        """
        shards = self._label_set.live_shards(fresh=False)
        ends = list(accumulate(shard.num_samples for shard in shards))
        found: list[Entry] = []
        for shard, end in zip(shards, ends, strict=True):
            first = end - shard.num_samples
            low, high = max(start, first), min(start + count, end)
            if low < high:
                entries = self._rows(shard, range(low - first, high - first))
                keys = [entry.key for entry in entries]
                found += self._served(shard, keys, entries, low - first)
        return found

    def entries(self, keys: Sequence[str]) -> list[Entry]:
        """The given samples, in their order.

        Raises:
            NotLabelledError: if one is not stored.
        """
        located = self._label_set.locate(keys).entries if keys else None
        if located is None:
            return []
        index = self._label_set.index
        return [
            self._rows(index.shard(shard), range(row, row + 1))[0]
            for shard, row in zip(located.shard.tolist(), located.row.tolist(), strict=True)
        ]

    def _served(
        self, shard: ShardRecord, keys: list[str], entries: list[Entry], first: int
    ) -> list[Entry]:
        """Those entries, from row ``first`` on, that are no copies of older samples."""
        located = self._label_set.locate(keys).entries
        index = self._label_set.index
        rows = np.arange(first, first + len(keys))
        here = [index.shard(place).name == shard.name for place in located.shard.tolist()]
        served = (np.array(here, dtype=np.bool_) & (located.row == rows)).tolist()
        return [entry for entry, is_served in zip(entries, served, strict=True) if is_served]

    def _rows(self, shard: ShardRecord, rows: range) -> list[Entry]:
        """Rows of a shard's samples file."""
        found: list[Entry] = []
        for number in range(
            rows.start // SAMPLES_BATCH_ROWS, (rows.stop - 1) // SAMPLES_BATCH_ROWS + 1
        ):
            first = number * SAMPLES_BATCH_ROWS
            batch = self._open(shard).batch(number, list(COLUMNS))
            low, high = max(rows.start - first, 0), min(rows.stop - first, len(batch))
            found += [_entry(row) for row in batch.slice(low, high - low).to_pylist()]
        return found

    def _open(self, shard: ShardRecord) -> ArrowFile:
        if shard.name not in self._files:
            try:
                self._files[shard.name] = self._label_set.open_table(shard, "samples")
            except FileNotFoundError as error:
                raise ShardCorruptError(
                    f"{error}: it was compacted meanwhile, or it is lost; ask again, and run "
                    "`distill verify` if that does not help"
                ) from error
            if len(self._files) > HELD_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard.name)
        return self._files[shard.name]


def _entry(row: dict[str, object]) -> Entry:
    prompt = row["prompt_ids"]
    assert isinstance(prompt, list)
    return Entry(
        key=str(row["sample_key"]),
        num_rows=int(str(row["num_rows"])),
        num_tokens=int(str(row["num_tokens"])),
        sample_index=int(str(row["sample_index"])),
        finish_reason=str(row["finish_reason"]),
        prompt_tail=tuple(prompt[-PREVIEW_TOKENS:]),
    )
