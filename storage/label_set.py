"""One label set: all samples that share a label set key; always open for more.

Layout below ``label_sets/<label set key>/`` (``docs/format.md`` section 1)::

    spec.json                                   the request it answers
    commits/00000001.json                       the history, and its summaries:
    merged/00000001-00000032.json
    index/<name>.arrow                          which samples, and where
    index/<name>.shards.arrow                   the shards of a merged record
    shards/<name>.labels.arrow, <name>.samples.arrow
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.errors import NotLabelledError, ShardCorruptError
from storage.held import HeldBatches
from storage.index import INDEX_SCHEMA, format_keys, parse_keys
from storage.ipc import ArrowFile
from storage.label_batch import LabelBatch
from storage.log import MERGE_FACTOR, CommitLog, is_dropped
from storage.objects import Objects
from storage.partitions import Keys
from storage.records import FileRecord, IndexRecord, LabelSetDocument, Name, ShardRecord
from storage.sample_index import Located, SampleIndex
from storage.samples import LabelledSample
from storage.schema import labels_schema, samples_schema
from storage.shard import ShardReader
from storage.shard_cache import ShardCache

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    from datasets import Dataset
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

    from storage.records import CommitRecord
    from storage.sidecar import Sidecar, SidecarSpec
    from storage.verify import Problem
    from storage.writer import LabelWriter

Answer = TypeVar("Answer")

HELD_BYTES = 2**28
"""Decoded label batches that a reader keeps, so that a shuffled order does not decode each
sample's anew."""

HELD_SHARDS = 16
"""Open shards that a reader keeps."""

REREAD_RECORDS = 2 * MERGE_FACTOR
"""Single records after which a history is read anew, in its merged form."""

WHOLE_BYTES = 2**23
"""Remote files up to this size are fetched in one request; of larger ones only what is read."""


@dataclass(frozen=True, slots=True)
class LabelSetTotals:
    """Sizes of a label set; copies that are not served count until ``compact`` drops them."""

    num_commits: int
    num_shards: int
    num_samples: int
    num_tokens: int
    """Response tokens."""
    num_rows: int
    """Labelled positions."""
    num_bytes: int
    num_partitions: int


class LabelSet:
    """The samples of one label set, as of the last refresh.

    Args:
        objects: The store's objects.
        document: The checked ``spec.json``.
    """

    def __init__(self, objects: Objects, document: LabelSetDocument) -> None:
        self.objects = objects
        self.document = document
        self.spec = document.spec
        self.key = document.key
        self.prefix = f"label_sets/{self.key}"
        self.partition_bits = document.partition_bits
        self._start_over()
        self._missed: set[str] = set()
        self._missed_as_of = 0
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()
        self.held: HeldBatches = HeldBatches(HELD_BYTES)
        """Batches that reading keeps decoded; readers of many places at once raise its limit."""
        self.held_shards = HELD_SHARDS
        """Shards that reading keeps open."""
        self.cache: ShardCache | None = None
        """Where copies of remote shards are kept; None to read them in place."""

    def _start_over(self) -> None:
        self.log = CommitLog(self.objects, self.prefix, self.key)
        self.index = SampleIndex(self.open_index, self.log.shards)
        self.deleted: set[str] = set()
        """Names that ``gc`` announced to delete."""
        self.dropped = False
        """Whether ``rm`` dropped the set and nothing was added since."""

    # -- what is stored ---------------------------------------------------------------------------
    def refresh(self) -> None:
        """Take up commits that appeared since the last call.

        Every question about what is missing does it; reading does it when something is.

        Raises:
            FormatError: if a record is malformed, belongs to another set or a number is missing.
            ShardCorruptError: if a record is damaged.
        """
        if self.log.num_single > REREAD_RECORDS:  # merged by now: fewer indexes to search
            self._start_over()
        for record in self.log.refresh():
            self.index.add(record)
            self.deleted.update(record.deleted)
            if record.partition_bits is not None:
                self.partition_bits = record.partition_bits
            self.dropped = is_dropped([record], before=self.dropped)

    def contains(self, keys: Sequence[str] | Keys, *, fresh: bool = True) -> npt.NDArray[np.bool_]:
        """bool[N]: which of the sample keys are stored; opens no shard.

        Args:
            keys: N sample keys.
            fresh: Look for new commits first.
        """
        parsed = parse_keys(keys)
        return self.ask(lambda index: index.contains(parsed), fresh=fresh)

    def ask(self, question: Callable[[SampleIndex], Answer], *, fresh: bool = True) -> Answer:
        """Answer from the index; its files may have been merged and deleted meanwhile.

        Raises:
            ShardCorruptError: if an index file is missing or damaged.
        """
        if fresh or self.log.last == 0:
            self.refresh()
        try:
            return question(self.index)
        except FileNotFoundError:
            self._start_over()
            self.refresh()
        try:
            return question(self.index)
        except FileNotFoundError as error:
            raise ShardCorruptError(
                f"{error}, but it was committed: run `distill repair`"
            ) from error

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The given sample keys that are not stored, in their order.

        A sample that was missing can appear in new commits only: asking again for some of the keys
        of the last large question searches nothing else.
        """
        self.refresh()
        parsed = parse_keys(keys)
        again = len(keys) > 0 and self._missed.issuperset(keys)
        after = self._missed_as_of if again else 0
        stored = self.ask(lambda index: index.contains(parsed, after=after), fresh=False).tolist()
        missing = [key for key, there in zip(keys, stored, strict=True) if not there]
        if not again:
            self._missed, self._missed_as_of = set(missing), self.log.last
        return missing

    def locate(self, keys: Sequence[str] | Keys) -> Located:
        """Where the samples lie and how long they are; opens no shard.

        Raises:
            NotLabelledError: if a sample is not stored.
        """
        parsed = parse_keys(keys)
        located = self.ask(lambda index: index.locate(parsed), fresh=False)
        if not located.found.all():
            located = self.ask(lambda index: index.locate(parsed))
        if not located.found.all():
            absent = np.flatnonzero(~located.found)
            (first,) = format_keys(parsed[absent[:1]])
            raise NotLabelledError(
                f"label set {self.key} lacks {len(absent)} of {len(keys)} samples "
                f"(the first is {first}); run `distill label` first"
            )
        return located

    def served_from(self, shard: ShardRecord, keys: Sequence[str]) -> npt.NDArray[np.bool_]:
        """bool[S]: which samples of a shard are served from it, and not from an older copy.

        Args:
            shard: One of the set's shards.
            keys: Sample keys of all S samples of the shard, in its order.
        """
        parsed = parse_keys(keys)

        def search(index: SampleIndex) -> npt.NDArray[np.bool_]:
            entries = index.locate(parsed).entries
            here = [n for n in set(entries.shard.tolist()) if index.shard(n).name == shard.name]
            rows = np.arange(len(keys))
            served: npt.NDArray[np.bool_] = np.isin(entries.shard, here) & (entries.row == rows)
            return served

        return self.ask(search, fresh=False)

    def live_shards(self, *, fresh: bool = True) -> list[ShardRecord]:
        """Shards that are served, in the order of their commits; ``fresh`` as in ``contains``."""
        return self.ask(lambda index: index.live_shards, fresh=fresh)

    def totals(self) -> LabelSetTotals:
        """Sizes of what is served now."""
        shards = self.live_shards()
        return LabelSetTotals(
            num_commits=self.log.last,
            num_shards=len(shards),
            num_samples=sum(shard.num_samples for shard in shards),
            num_tokens=sum(shard.num_tokens for shard in shards),
            num_rows=sum(shard.num_rows for shard in shards),
            num_bytes=sum(shard.num_bytes for shard in shards),
            num_partitions=2**self.partition_bits,
        )

    # -- reading ----------------------------------------------------------------------------------
    def read(self, keys: Sequence[str]) -> Iterator[LabelledSample]:
        """The given samples in the given order, verified.

        Random access: a sample costs the decoding of its record batch, and batches are kept for
        their neighbours. Samples that ``compact`` moves meanwhile are found again.

        Raises:
            NotLabelledError: if a key is not stored.
            ShardCorruptError: if the bytes differ from what was committed.
            BadLabelError: if a label cannot be one.
        """
        start = 0
        while start < len(keys):
            entries = self.locate(keys[start:]).entries
            index = self.index  # stays what it is if the set starts over meanwhile
            columns = (entries.shard, entries.row, entries.first_row)
            for number, row, first_row in zip(*(c.tolist() for c in columns), strict=True):
                shard = index.shard(number)
                try:
                    sample = self._sample(shard, row, first_row)
                except FileNotFoundError as error:
                    self.require_moved(shard, error)
                    break
                if sample is None or sample.key != keys[start]:
                    raise ShardCorruptError(
                        f"shard {shard.name} of label set {self.key} does not hold sample "
                        f"{keys[start]} where its index says; run `distill repair`"
                    )
                yield sample
                start += 1

    def _sample(self, shard: ShardRecord, row: int, first_row: int) -> LabelledSample | None:
        number = bisect_right(list(accumulate(shard.batch_rows)), first_row)
        if number == len(shard.batch_rows):
            return None
        batch: LabelBatch = self.held.get((shard.name, number), lambda: self.decode(shard, number))
        place = int(np.searchsorted(batch.rows_S, row))
        if place == len(batch) or batch.rows_S[place] != row:
            return None
        return batch.sample(place)

    def decode(self, shard: ShardRecord, number: int) -> LabelBatch:
        """A record batch of a shard, verified.

        Raises:
            FileNotFoundError: if a file of the shard does not exist.
            ShardCorruptError: if the bytes differ from what was committed.
            BadLabelError: if a label cannot be one.
        """
        try:
            return self.reader(shard).batch(number)
        except ShardCorruptError as error:
            raise type(error)(
                f"{error}; with it the {shard.num_samples} samples of shard {shard.name} are lost: "
                "after `distill repair`, `distill label` asks for them again"
            ) from error

    def require_moved(self, shard: ShardRecord, error: FileNotFoundError) -> None:
        """A missing file is no damage if the shard was replaced meanwhile.

        Raises:
            ShardCorruptError: if it was not.
        """
        if shard.name in {live.name for live in self.live_shards()}:
            raise ShardCorruptError(
                f"{error}, but it was committed: {shard.num_samples} samples are lost; "
                "run `distill repair`, then `distill label` again"
            ) from error

    def reader(self, shard: ShardRecord) -> ShardReader:
        """An open shard; the last used ones stay open.

        Raises:
            FileNotFoundError: if one of its files does not exist.
            ShardCorruptError: if one does not have the size of its record.
        """
        if shard.name not in self._readers:
            self._readers[shard.name] = ShardReader(
                self.open_table(shard, "labels"),
                self.open_table(shard, "samples"),
                self.spec,
                shard.batch_rows,
                name=f"{self.objects.uri}/{self.shard_path(shard.name, 'labels')}",
                held=self.held,
            )
            if len(self._readers) > self.held_shards:
                self._readers.popitem(last=False)
        self._readers.move_to_end(shard.name)
        return self._readers[shard.name]

    # -- files ------------------------------------------------------------------------------------
    def shard_path(self, name: Name, table: str) -> str:
        """Where a table of a shard lies: ``labels`` or ``samples``."""
        return f"{self.prefix}/shards/{name}.{table}.arrow"

    def index_path(self, name: Name) -> str:
        """Where an index file lies."""
        return f"{self.prefix}/index/{name}.arrow"

    def files(self, table: str = "labels") -> list[str]:
        """Paths, below the store's URI, of the files that are served now: for other readers."""
        return [self.shard_path(shard.name, table) for shard in self.live_shards()]

    def open_table(self, shard: ShardRecord, table: str) -> ArrowFile:
        """One of the two files of a shard."""
        path = self.shard_path(shard.name, table)
        return self._open(path, shard.file(table), self.table_schema(table))

    def table_schema(self, table: str) -> pa.Schema:
        """What a table of the set's shards must look like."""
        return labels_schema(self.spec) if table == "labels" else samples_schema(self.spec)

    def open_index(self, record: IndexRecord, most: bool = True) -> ArrowFile:
        """An index file.

        Args:
            record: Which.
            most: Whether most of it will be read: then it is fetched in one request.

        Raises:
            FileNotFoundError: if it does not exist.
            ShardCorruptError: if it does not have the size of its record.
        """
        return self._open(self.index_path(record.name), record.file, INDEX_SCHEMA, most=most)

    def _open(
        self, path: str, file: FileRecord, schema: pa.Schema, *, most: bool = False
    ) -> ArrowFile:
        name = f"{self.objects.uri}/{path}"
        source: bytes | pa.NativeFile
        if self.objects.root is None and self.cache is not None:
            source = self.cache.open(self.objects, path, file)
            size = source.size()
        elif self.objects.root is None and (most or file.num_bytes <= WHOLE_BYTES):
            source = self.objects.get(path)
            size = len(source)
        else:
            source, size = self.objects.open(path)
        if size != file.num_bytes:
            raise ShardCorruptError(
                f"{name} has {size} bytes, its commit record says {file.num_bytes}; it was "
                "truncated or replaced: run `distill repair`"
            )
        return ArrowFile(source, name=name, schema=schema)

    # -- everything else --------------------------------------------------------------------------
    def scan(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All label rows, shard after shard; see :func:`storage.export.scan`."""
        from storage.export import scan

        return scan(self, columns)

    def to_arrow(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All label rows as one table; see :func:`storage.export.to_arrow`."""
        from storage.export import to_arrow

        return to_arrow(self, columns)

    def to_datasets(self, columns: Sequence[str] | None = None) -> "Dataset":
        """All label rows as a Hugging Face dataset; see :func:`storage.export.to_datasets`."""
        from storage.export import to_datasets

        return to_datasets(self, columns)

    def to_polars(self, columns: Sequence[str] | None = None) -> "pl.DataFrame":
        """All label rows as a polars frame; see :func:`storage.export.to_polars`."""
        from storage.export import to_polars

        return to_polars(self, columns)

    def to_pandas(self, columns: Sequence[str] | None = None) -> "pd.DataFrame":
        """All label rows as a pandas frame; see :func:`storage.export.to_pandas`."""
        from storage.export import to_pandas

        return to_pandas(self, columns)

    def to_duckdb(
        self,
        columns: Sequence[str] | None = None,
        *,
        connection: "DuckDBPyConnection | None" = None,
    ) -> "DuckDBPyRelation":
        """Label rows as a lazy relation of DuckDB; see :func:`storage.export.to_duckdb`."""
        from storage.export import to_duckdb

        return to_duckdb(self, columns, connection=connection)

    def sidecar(self, spec: "SidecarSpec") -> "Sidecar":
        """Columns that somebody computed for these labels; see :mod:`storage.sidecar`."""
        from storage.sidecar import Sidecar

        return Sidecar(self, spec)

    def verify(self) -> Iterator["Problem"]:
        """What is damaged; see :func:`storage.verify.verify`."""
        from storage.verify import verify

        return verify(self)

    def append(
        self, samples: Sequence[LabelledSample], provenance: dict[str, str]
    ) -> "CommitRecord | None":
        """Commit new samples in one step; see :func:`storage.writer.append`."""
        from storage.writer import append

        return append(self, samples, provenance)

    def writer(self, provenance: dict[str, str], *, commit_samples: int) -> "LabelWriter":
        """A bounded buffer in front of :meth:`append`; see :class:`storage.writer.LabelWriter`."""
        from storage.writer import LabelWriter

        return LabelWriter(self, provenance, commit_samples=commit_samples)
