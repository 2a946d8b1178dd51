"""What of a label set a query sees: the shards of the moment at which the database was opened."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from storage.errors import ShardCorruptError
from storage.ipc import ArrowFile
from storage.label_set import LabelSet
from storage.records import ShardRecord
from storage.sql.scan import Request
from storage.sql.sources import SOURCE_FIELDS, Sources
from storage.sql.texts import Texts

SET_FIELDS = [pa.field("label_set", pa.string()), pa.field("set_name", pa.string())]
"""Which set a row belongs to: its key, and the name that the query gave it."""

SAMPLE_FIELDS = [
    pa.field("sample_key", pa.string()),
    pa.field("prompt_key", pa.string()),
    pa.field("sample_index", pa.int32()),
    pa.field("finish_reason", pa.string()),
]
"""Columns of the samples file that every view has."""

PARALLEL_SHARDS = 8
"""Shards of a bucket that are opened ahead of the one that is read."""


@dataclass(frozen=True)
class OpenShard:
    """A shard and its two files."""

    record: ShardRecord
    labels: ArrowFile
    samples: ArrowFile

    def close(self) -> None:
        """Close both; what was read of them stays valid."""
        self.labels.close()
        self.samples.close()


class Snapshot:
    """One label set as it was when the database was opened.

    Args:
        label_set: The set; used by nobody else.
        name: What the query calls it, if it does.
        sources: Where prompts of the store came from.
        texts: The text of its tokens.
    """

    def __init__(
        self, label_set: LabelSet, name: str | None, sources: Sources, texts: Texts
    ) -> None:
        self.label_set, self.name, self.sources, self.texts = label_set, name, sources, texts
        self.shards = label_set.live_shards()
        self._index = label_set.index

    def served(self, record: ShardRecord, keys: Sequence[str]) -> npt.NDArray[np.bool_]:
        """bool[S]: which samples of a shard are served from it.

        Raises:
            ShardCorruptError: if the index was replaced since: it does not know the shard any more.
        """
        found = self.label_set.served_from(record, keys)
        if self.label_set.index is not self._index:
            raise ShardCorruptError(
                f"label set {self.label_set.key} was compacted and its index deleted while it was "
                "read; ask again"
            )
        return found

    def open_shards(self, request: Request) -> Iterator[OpenShard]:
        """The shards that may hold what is asked for, in the order of their commits.

        Raises:
            ShardCorruptError: if a file is gone or not the committed one.
        """
        label_set = self.label_set
        if not request.may_hold([self._guarantee()]):
            return
        places = request.may_hold([_partition_guarantee(shard.partition) for shard in self.shards])
        ahead = 1 if label_set.objects.root is not None else PARALLEL_SHARDS
        with ThreadPoolExecutor(ahead) as pool:
            waiting: deque[Future[OpenShard]] = deque()
            try:
                for place in places:
                    waiting.append(pool.submit(self._open, self.shards[place]))
                    if len(waiting) == ahead:
                        yield from _opened(waiting.popleft())
                while waiting:
                    yield from _opened(waiting.popleft())
            finally:
                for future in waiting:
                    future.cancel()

    def _open(self, record: ShardRecord) -> OpenShard:
        try:
            return OpenShard(
                record,
                self.label_set.open_table(record, "labels"),
                self.label_set.open_table(record, "samples"),
            )
        except FileNotFoundError as error:
            raise ShardCorruptError(
                f"{error}: it was replaced while the set was read, or it is lost; ask again, and "
                "run `distill verify` if that does not help"
            ) from error

    def _guarantee(self) -> pc.Expression:
        """What all rows of the set meet."""
        name = pc.field("set_name")
        named = name.is_null() if self.name is None else name == self.name
        return (pc.field("label_set") == self.label_set.key) & named

    # -- samples of a shard -----------------------------------------------------------------------
    def sample_columns(self, shard: OpenShard, names: Sequence[str]) -> "ShardSamples":
        """What is known of the samples of a shard.

        Args:
            shard: The shard.
            names: Of ``SET_FIELDS``, ``SAMPLE_FIELDS``, ``SOURCE_FIELDS`` or of the samples file.
        """
        schema = self.label_set.table_schema("samples")
        stored = [name for name in names if name in schema.names and name != "sample_key"]
        table = shard.samples.table(
            list(dict.fromkeys(["sample_key", "first_row", "num_rows", *stored]))
        ).combine_chunks()
        columns = {name: _one_chunk(table[name]) for name in table.column_names}
        keys = columns["sample_key"]
        served = self.served(shard.record, keys.to_pylist())
        made: dict[str, Callable[[], pa.Array]] = {
            "label_set": lambda: pa.repeat(self.label_set.key, len(keys)),
            "set_name": lambda: pa.repeat(pa.scalar(self.name, pa.string()), len(keys)),
        }
        columns |= {name: make() for name, make in made.items() if name in names}
        if any(field.name in names for field in SOURCE_FIELDS):
            columns |= self.sources.of(keys)
        return ShardSamples(columns, served)


@dataclass(frozen=True)
class ShardSamples:
    """Columns of the S samples of a shard."""

    columns: Mapping[str, pa.Array]
    """At least ``sample_key``, ``first_row`` and ``num_rows``."""
    served_S: npt.NDArray[np.bool_]
    """bool[S]: which are served from this shard."""

    def wanted(self, request: Request) -> npt.NDArray[np.bool_]:
        """bool[S]: those that are served and, as far as samples decide, meet the condition."""
        names = request.condition_columns
        if request.condition is None or any(name not in self.columns for name in names):
            return self.served_S
        meets = np.zeros(len(self.served_S), np.bool_)
        meets[request.rows({"sample_key": self.columns["sample_key"], **self.columns})] = True
        return self.served_S & meets

    def batches(
        self, request: Request, wanted_S: npt.NDArray[np.bool_], batch_rows: Sequence[int]
    ) -> list[int]:
        """Numbers of the batches of the labels file that may hold what is asked for."""
        ends = np.cumsum(batch_rows)
        batch_S = np.searchsorted(ends, self.columns["first_row"].to_numpy(), side="right")
        numbers: list[int] = np.unique(batch_S[wanted_S]).tolist()
        if not {"sample_key", "prompt_key"}.intersection(request.condition_columns):
            return numbers
        keys = self.columns["sample_key"].to_numpy(zero_copy_only=False)
        field = pc.field("sample_key")
        guarantees = []
        for number in numbers:
            here = keys[batch_S == number]
            guarantees.append((field >= min(here)) & (field <= max(here)))
        return [numbers[place] for place in request.may_hold(guarantees)]


def _opened(future: Future[OpenShard]) -> Iterator[OpenShard]:
    """One shard, closed when the next one is asked for."""
    shard = future.result()
    try:
        yield shard
    finally:
        shard.close()


def _partition_guarantee(partition: str) -> pc.Expression:
    """The range of the sample keys with these leading bits."""
    if not partition:
        return pc.scalar(True)
    low = f"{int(partition.ljust(16, '0'), 2):04x}"
    high = f"{int(partition.ljust(16, '1'), 2):04x}" + "f" * 28
    field = pc.field("sample_key")
    return (field >= low) & (field <= high)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
