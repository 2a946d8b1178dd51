"""The content-addressed label cache: find, read and append label sets.

Layout below the store's URI (``docs/format.md`` section 1)::

    label_sets/<label set key>/spec.json
    label_sets/<label set key>/commits/00000001.json
    label_sets/<label set key>/shards/<name>.labels.arrow, <name>.samples.arrow
    selections/<selection key>.arrow
"""

import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import xxhash

from storage.errors import (
    FormatError,
    LabelMismatchError,
    LabelStoreError,
    NotLabelledError,
    ShardCorruptError,
)
from storage.keys import LabelSetSpec
from storage.labels import LABEL_KINDS
from storage.objects import Objects
from storage.provenance import utc_now
from storage.records import CommitRecord, FileRecord, LabelSetDocument, ShardRecord, parse
from storage.samples import LabelledSample
from storage.schema import labels_schema, samples_schema
from storage.shard import ShardFile, encode_shard

HELD_SHARDS = 8
"""Decoded shards that a reader keeps, so that a shuffled order does not decode each sample's."""

INDEX_COLUMNS = ("sample_key", "first_row", "num_rows", "num_tokens")


@dataclass(frozen=True, slots=True)
class SampleAddress:
    """Where a sample lies: the shard and its rows there."""

    shard: ShardRecord
    row: int
    """Row in the samples file."""
    first_row: int
    num_rows: int
    num_tokens: int


@dataclass(slots=True)
class Problem:
    """One finding of ``LabelSet.verify``."""

    path: str
    error: str
    lost_samples: int


@dataclass(slots=True)
class LabelSetTotals:
    """Sizes of a label set; each sample counted once."""

    num_commits: int = 0
    num_shards: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class _Index:
    records: list[CommitRecord] = field(default_factory=list)
    addresses: dict[str, SampleAddress] = field(default_factory=dict)


class LabelSet:
    """All samples that share one label set key; always open for more.

    Args:
        objects: The store's objects.
        document: The checked ``spec.json``.
    """

    def __init__(self, objects: Objects, document: LabelSetDocument) -> None:
        self._objects = objects
        self.document = document
        self.spec = document.spec
        self.key = document.key
        self.prefix = f"label_sets/{self.key}"
        self._index = _Index()
        self._decoded: OrderedDict[str, list[LabelledSample]] = OrderedDict()

    # -- what is stored ---------------------------------------------------------------------------
    def refresh(self) -> list[CommitRecord]:
        """Read commit records that appeared since the last call; all records, oldest first.

        Raises:
            FormatError: if a record is malformed, belongs to another set or a number is missing.
        """
        for record in self._records_after(len(self._index.records)):
            self._add_to_index(record)
        return self._index.records

    def _records_after(self, number: int) -> Iterator[CommitRecord]:
        last = max(self._objects.paths(f"{self.prefix}/commits"), default="")
        while last > self._commit_path(number):
            number += 1
            path = self._commit_path(number)
            # by name, not from the listing: one taken during other writers' commits may skip some
            try:
                data = self._objects.get(path)
            except FileNotFoundError as error:
                raise FormatError(
                    f"{self._named(path)} is missing although {last!r} exists; "
                    "a record was removed or renamed"
                ) from error
            record = parse(CommitRecord, data, name=self._named(path))
            if record.number != number:
                raise FormatError(
                    f"{self._named(path)}: wanted commit {number} of label set {self.key}, "
                    f"found number {record.number}; a record was removed or renamed"
                )
            if record.label_set != self.key:
                raise FormatError(
                    f"{self._named(path)} belongs to label set {record.label_set}, not {self.key}"
                )
            yield record

    def _add_to_index(self, record: CommitRecord) -> None:
        for shard in record.shards:
            table = self._open(shard.samples, samples_schema(self.spec)).table(INDEX_COLUMNS)
            if table.num_rows != shard.num_samples:
                raise ShardCorruptError(
                    f"{self._named(self._shard_path(shard.samples))} holds {table.num_rows} "
                    f"samples, its commit record says {shard.num_samples}"
                )
            columns = [table.column(name).to_pylist() for name in INDEX_COLUMNS]
            for row, (key, first_row, num_rows, num_tokens) in enumerate(
                zip(*columns, strict=True)
            ):
                # the lower record number wins for ever
                self._index.addresses.setdefault(
                    key, SampleAddress(shard, row, first_row, num_rows, num_tokens)
                )
        self._index.records.append(record)

    def addresses(self) -> dict[str, SampleAddress]:
        """Every stored sample key and where it lies, from the commits that exist now."""
        self.refresh()
        return self._index.addresses

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The given sample keys that no commit holds, in their order."""
        stored = self.addresses()
        return [key for key in keys if key not in stored]

    def totals(self) -> LabelSetTotals:
        """Sizes of what is committed now."""
        addresses = self.addresses()
        shards = [shard for record in self._index.records for shard in record.shards]
        return LabelSetTotals(
            num_commits=len(self._index.records),
            num_shards=len(shards),
            num_samples=len(addresses),
            num_tokens=sum(address.num_tokens for address in addresses.values()),
            num_rows=sum(address.num_rows for address in addresses.values()),
            num_bytes=sum(s.labels.num_bytes + s.samples.num_bytes for s in shards),
        )

    # -- reading ----------------------------------------------------------------------------------
    def read(self, keys: Sequence[str]) -> Iterator[LabelledSample]:
        """The given samples in the given order, verified.

        One shard is held in memory at a time; keys that follow the order of the shards decode
        each shard once.

        Raises:
            NotLabelledError: if a key is not stored.
            ShardCorruptError: if the bytes differ from what was committed.
        """
        addresses = self.addresses()
        absent = [key for key in keys if key not in addresses]
        if absent:
            raise NotLabelledError(
                f"label set {self.key} lacks {len(absent)} of {len(keys)} samples "
                f"(the first is {absent[0]}); run `distill label` first"
            )
        for key in keys:
            address = addresses[key]
            yield self._held(address.shard)[address.row]

    def _held(self, shard: ShardRecord) -> list[LabelledSample]:
        """The decoded samples of a shard; the HELD_SHARDS last used stay in memory."""
        name = shard.labels.name
        if name not in self._decoded:
            self._decoded[name] = self._decode(shard)
            if len(self._decoded) > HELD_SHARDS:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(name)
        return self._decoded[name]

    def _decode(self, shard: ShardRecord) -> list[LabelledSample]:
        table = self._open(shard.labels, labels_schema(self.spec)).table().combine_chunks()
        rows = self._open(shard.samples, samples_schema(self.spec)).table().to_pylist()
        columns = {name: _single_array(table, name) for name in table.column_names}
        ids_NK, logprobs_NK = LABEL_KINDS[self.spec.kind.type](self.spec.kind).decode(columns)
        scalar = {
            name: columns[name].to_numpy()
            for name in table.column_names
            if not pa.types.is_fixed_size_list(columns[name].type)
        }
        if table.num_rows != shard.num_rows:
            raise ShardCorruptError(
                f"{self._named(self._shard_path(shard.labels))} holds {table.num_rows} rows, "
                f"its commit record says {shard.num_rows}"
            )
        samples = []
        for row in rows:
            span = slice(row["first_row"], row["first_row"] + row["num_rows"])
            response = row["response_ids"]
            samples.append(
                LabelledSample(
                    key=row["sample_key"],
                    sample_index=row["sample_index"],
                    prompt_ids_P=np.array(row["prompt_ids"], dtype=np.int32),
                    response_ids_R=scalar["token_id"][span]
                    if response is None
                    else np.array(response, dtype=np.int32),
                    positions_N=scalar["position"][span],
                    token_logprob_N=scalar["token_logprob"][span],
                    token_rank_N=scalar["token_rank"][span],
                    log_tail_mass_N=scalar["log_tail_mass"][span],
                    topk_ids_NK=ids_NK[span],
                    topk_logprobs_NK=logprobs_NK[span],
                    entropy_N=scalar["entropy"][span] if "entropy" in scalar else None,
                    finish_reason=row["finish_reason"],
                    stop_reason=row["stop_reason"],
                )
            )
        return samples

    def _open(self, file: FileRecord, schema: pa.Schema) -> ShardFile:
        path = self._shard_path(file)
        try:
            data = self._objects.get(path)
        except FileNotFoundError as error:
            raise ShardCorruptError(f"{self._named(path)} was committed and is missing") from error
        if len(data) != file.num_bytes:
            raise ShardCorruptError(
                f"{self._named(path)} has {len(data)} bytes, its commit record says "
                f"{file.num_bytes}; it was truncated or replaced"
            )
        found = xxhash.xxh3_128_hexdigest(data)
        if found != file.xxh3_128:
            raise ShardCorruptError(
                f"{self._named(path)} has the checksum {found}, committed was {file.xxh3_128}; "
                "run `distill verify`"
            )
        return ShardFile(data, name=self._named(path), schema=schema)

    def verify(self) -> Iterator[Problem]:
        """Read every byte of every committed file; yields what is damaged.

        Raises:
            FormatError: if the history itself (spec or commit records) cannot be read.
        """
        for record in self._records_after(0):
            for shard in record.shards:
                for file, schema in (
                    (shard.labels, labels_schema(self.spec)),
                    (shard.samples, samples_schema(self.spec)),
                ):
                    try:
                        opened = self._open(file, schema)
                        for _ in opened.batches():
                            pass
                    except (ShardCorruptError, FormatError) as error:
                        yield Problem(self._shard_path(file), str(error), shard.num_samples)

    # -- writing ----------------------------------------------------------------------------------
    def append(
        self, samples: Sequence[LabelledSample], provenance: dict[str, str]
    ) -> CommitRecord | None:
        """Commit new samples in one step: all of them become visible or none.

        Samples that another writer committed first are left out, so a sample is stored once.
        Any number of processes and hosts may append at the same time.

        Returns:
            The commit record, or None when every sample was already stored.

        Raises:
            BadLabelError: if a sample breaks an invariant; nothing is written.
            LabelStoreError: if the store cannot be written; earlier commits are intact.
        """
        for sample in samples:
            sample.check(self.spec)
        unique = {sample.key: sample for sample in samples}
        while True:
            stored = self.addresses()
            new = [sample for key, sample in unique.items() if key not in stored]
            if not new:
                return None
            number = len(self._index.records) + 1
            shard = self._write_shard(new)
            record = CommitRecord(
                label_set=self.key,
                number=number,
                shards=(shard,),
                created_at=utc_now(),
                provenance=provenance,
            )
            document = record.model_dump_json(indent=1).encode()
            if self._objects.create(self._commit_path(number), document):
                self._add_to_index(record)
                return record
            # Another writer took this number. Its samples may overlap with ours, so look again;
            # our shard is named by no record and stays invisible.

    def _write_shard(self, samples: Sequence[LabelledSample]) -> ShardRecord:
        encoded = encode_shard(samples, self.spec)
        stem = f"{xxhash.xxh3_64_hexdigest(encoded.labels)}-{uuid.uuid4().hex[:8]}"
        files = []
        for table, data in (("labels", encoded.labels), ("samples", encoded.samples)):
            file = FileRecord(
                name=f"{stem}.{table}.arrow",
                num_bytes=len(data),
                xxh3_128=xxhash.xxh3_128_hexdigest(data),
            )
            if not self._objects.create(self._shard_path(file), data):
                raise LabelStoreError(f"{self._named(self._shard_path(file))} exists already")
            files.append(file)
        return ShardRecord(
            labels=files[0],
            samples=files[1],
            num_samples=encoded.num_samples,
            num_rows=encoded.num_rows,
            num_tokens=encoded.num_tokens,
        )

    def _commit_path(self, number: int) -> str:
        return f"{self.prefix}/commits/{number:08d}.json"

    def _shard_path(self, file: FileRecord) -> str:
        return f"{self.prefix}/shards/{file.name}"

    def _named(self, path: str) -> str:
        return f"{self._objects.uri}/{path}"


def _single_array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


class LabelStore:
    """The label sets below one URI.

    Args:
        uri: Local path, ``s3://``, ``gs://`` or ``az://``.
        create: Make a missing local directory.
    """

    def __init__(self, uri: str, *, create: bool = False) -> None:
        self.objects = Objects(uri, create=create)
        self.uri = uri

    def keys(self) -> list[str]:
        """Keys of all label sets, sorted."""
        return self.objects.directories("label_sets")

    def open(self, key: str) -> LabelSet:
        """Open a label set by its key or by a unique beginning of it.

        Raises:
            LabelStoreError: if no set or several sets match.
            FormatError: if the stored spec does not have this key (edited or renamed).
        """
        matches = [found for found in self.keys() if found.startswith(key)]
        if len(matches) != 1:
            what = "several label sets" if matches else "no label set"
            known = ", ".join(matches or self.keys()) or "none"
            raise LabelStoreError(
                f"{what} of store {self.uri!r} match {key!r}; label sets here: {known}"
            )
        path = f"label_sets/{matches[0]}/spec.json"
        document = self._document(path)
        if document is None:
            raise FormatError(f"{self.uri}/{path} is missing")
        if document.key != matches[0] or document.spec.key != matches[0]:
            raise FormatError(
                f"{self.uri}/{path}: its content has the key {document.spec.key}; "
                "the spec was edited or the folder renamed"
            )
        return LabelSet(self.objects, document)

    def find(self, spec: LabelSetSpec) -> LabelSet | None:
        """The label set that answers a request, ``None`` if there is none yet.

        Raises:
            LabelMismatchError: if the stored spec is another one than the request.
        """
        document = self._document(f"label_sets/{spec.key}/spec.json")
        if document is None:
            return None
        if document.spec != spec or document.key != spec.key:
            raise LabelMismatchError(
                f"label set {spec.key} of store {self.uri!r} was made for another request: "
                f"wanted {spec.model_dump()}, found {document.spec.model_dump()}"
            )
        return LabelSet(self.objects, document)

    def create(self, spec: LabelSetSpec, provenance: dict[str, str]) -> LabelSet:
        """The label set of a request, created if it does not exist."""
        document = LabelSetDocument(key=spec.key, spec=spec, provenance=provenance)
        self.objects.create(
            f"label_sets/{spec.key}/spec.json", document.model_dump_json(indent=1).encode()
        )
        found = self.find(spec)
        if found is None:
            raise LabelStoreError(f"label set {spec.key} of {self.uri!r} vanished after creation")
        return found

    def _document(self, path: str) -> LabelSetDocument | None:
        try:
            data = self.objects.get(path)
        except FileNotFoundError:
            return None
        return parse(LabelSetDocument, data, name=f"{self.uri}/{path}")
