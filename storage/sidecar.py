"""Sidecars: columns that somebody computed for stored labels, such as a student's KL per token.

A sidecar lies beside its label set under the key of its producer, and is extended by numbered
parts. A part is one Arrow file that is created with put-if-absent: it is its own commit. Its rows
repeat the tokens and log-probs for which they were computed, so numbers of labels that were lost
and labelled anew are not served. If a sample occurs in two parts, the lower number is served.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, ValidationError, field_validator

from storage.config import Config
from storage.errors import (
    BadLabelError,
    EditedSpecError,
    FormatError,
    NotLabelledError,
    ShardCorruptError,
)
from storage.ipc import ArrowFile, encode_file
from storage.keys import canonical_json, key_of
from storage.label_set import LabelSet
from storage.samples import LabelledSample
from storage.schema import FORMAT_VERSION, SCALAR_FIELDS

LABEL_COLUMNS = {
    "position": "positions_N",
    "token_id": "token_ids_N",
    "token_logprob": "token_logprob_N",
}
"""Columns that tie a row to its label, and what they are of a sample."""

LABEL_FIELDS = [field for field in SCALAR_FIELDS if field.name in LABEL_COLUMNS]

COLUMN_NAME = r"^[a-z][a-z0-9_]{0,62}$"


class SidecarSpec(Config):
    """What a sidecar's numbers depend on. Its digest is the address of the sidecar."""

    producer: dict[str, str]
    """Digest of the student, estimator, settings, ...: everything that can change a number."""
    columns: tuple[str, ...] = Field(min_length=1)
    """Names of the float columns, sorted."""

    @field_validator("columns")
    @classmethod
    def _columns_are_plain(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        bad = [name for name in columns if not re.fullmatch(COLUMN_NAME, name)]
        if bad or list(columns) != sorted(set(columns)):
            raise ValueError(f"columns must be sorted, distinct and like {COLUMN_NAME}: {columns}")
        return columns

    @property
    def key(self) -> str:
        """The sidecar key."""
        return key_of({"format": FORMAT_VERSION, "sidecar": self})


def sidecar_schema(label_set: str, spec: SidecarSpec) -> pa.Schema:
    """Schema of the parts: one row per position."""
    values = [pa.field(name, pa.float32(), nullable=False) for name in spec.columns]
    return pa.schema(
        [
            pa.field("sample_key", pa.string(), nullable=False),
            *LABEL_FIELDS,
            *values,
        ],
        metadata={
            "distillcache.format": str(FORMAT_VERSION),
            "distillcache.table": "sidecar",
            "distillcache.label_set": label_set,
            "distillcache.spec": canonical_json(spec),
        },
    )


class Sidecar:
    """The sidecar of one producer.

    Args:
        label_set: The labelled samples that the numbers belong to.
        spec: The producer and its columns.
    """

    def __init__(self, label_set: LabelSet, spec: SidecarSpec) -> None:
        self.spec = spec
        self._set, self._objects = label_set, label_set.objects
        self._prefix = f"{label_set.prefix}/sidecars/{spec.key}"
        self._schema = sidecar_schema(label_set.key, spec)

    def append(self, values: Mapping[str, Mapping[str, npt.ArrayLike]]) -> int:
        """Add the numbers of some samples in one step; returns the number of the part, 0 for none.

        Args:
            values: For every sample key and column float[N], one value per labelled position.

        Raises:
            NotLabelledError: if the label set lacks a sample.
            BadLabelError: if a column is missing, has another length than the sample has label
                rows, or is not finite.
            LabelStoreError: if the store cannot be written.
        """
        samples = list(self._set.read(list(values)))
        if not samples:
            return 0
        columns: dict[str, list[npt.NDArray[np.float32]]] = {n: [] for n in self.spec.columns}
        for sample in samples:
            for name, parts in columns.items():
                found = np.asarray(values[sample.key].get(name, ()), dtype=np.float32)
                if found.shape != sample.positions_N.shape or not np.isfinite(found).all():
                    raise BadLabelError(
                        f"sidecar column {name!r} of sample {sample.key} must be "
                        f"{len(sample.positions_N)} finite numbers, found shape {found.shape}"
                    )
                parts.append(found)
        lengths = [len(sample.positions_N) for sample in samples]
        keys = pa.array(np.repeat([sample.key for sample in samples], lengths).tolist())
        labels = [[getattr(sample, n) for sample in samples] for n in LABEL_COLUMNS.values()]
        arrays = [pa.array(np.concatenate(parts)) for parts in (*labels, *columns.values())]
        arrays.insert(0, keys)
        data = encode_file([pa.RecordBatch.from_arrays(arrays, schema=self._schema)], self._schema)
        self._objects.create(f"{self._prefix}/spec.json", _spec_bytes(self.spec))
        for number in count(self._count() + 1):
            if self._objects.create(self._part(number), data):
                return number
        raise AssertionError("unreachable")

    def to_arrow(self) -> pa.Table:
        """All rows that belong to labels which are stored now, each sample once.

        Raises:
            ShardCorruptError: if a part is damaged.
        """
        computed = self._by_sample()
        lost = set(self._set.missing(list(computed)))
        stored = [key for key in computed if key not in lost]
        found = [_of(sample, computed) for sample in self._set.read(stored)]
        return pa.concat_tables(
            [self._schema.empty_table(), *(rows for rows in found if rows is not None)]
        )

    def read(self, keys: Sequence[str]) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
        """For every sample its columns as float32[N], in the order of the keys.

        Raises:
            NotLabelledError: if the sidecar has no numbers for the labels of a sample.
            ShardCorruptError: if a part is damaged.
        """
        computed = self._by_sample()
        for sample in self._set.read(keys):
            rows = _of(sample, computed)
            if rows is None:
                raise NotLabelledError(
                    f"sidecar {self.spec.key} has no numbers for the labels of sample {sample.key}"
                )
            yield {name: rows[name].to_numpy() for name in self.spec.columns}

    def _by_sample(self) -> dict[str, list[pa.Table]]:
        """The rows of every sample, part by part."""
        found: dict[str, list[pa.Table]] = {}
        for table in self._parts():
            keys = table["sample_key"].to_pylist()
            starts = [n for n, (one, key) in enumerate(pairwise([None, *keys])) if one != key]
            for start, stop in pairwise([*starts, len(keys)]):
                found.setdefault(keys[start], []).append(table.slice(start, stop - start))
        return found

    def damaged(self) -> Iterator[tuple[int, str, str]]:
        """Number, path and error of every part that cannot be served."""
        for number in range(1, self._count() + 1):
            try:
                self._table(number)
            except (FormatError, ShardCorruptError) as error:
                yield number, self._part(number), str(error)

    def give_up(self, number: int) -> None:
        """Replace a damaged part by an empty one; its numbers can be computed again."""
        self._objects.delete(self._part(number))
        self._objects.create(self._part(number), encode_file([], self._schema))

    def _parts(self) -> Iterator[pa.Table]:
        return (self._table(number) for number in range(1, self._count() + 1))

    def _table(self, number: int) -> pa.Table:
        path = self._part(number)
        name = f"{self._objects.uri}/{path}"
        try:
            data = self._objects.get(path)
        except FileNotFoundError as error:
            raise FormatError(f"{name} is missing although later parts exist") from error
        with ArrowFile(data, name=name, schema=self._schema) as file:
            return file.table()

    def _count(self) -> int:
        """Number of the last part."""
        last = max(self._objects.paths(f"{self._prefix}/parts"), default="")
        return int(last.rpartition("/")[2].partition(".")[0] or 0)

    def _part(self, number: int) -> str:
        return f"{self._prefix}/parts/{number:08d}.arrow"


def _of(sample: LabelledSample, computed: Mapping[str, list[pa.Table]]) -> pa.Table | None:
    """The oldest rows that were computed for these very labels."""
    for rows in computed.get(sample.key, ()):
        if all(
            np.array_equal(rows[column].to_numpy(), getattr(sample, name))
            for column, name in LABEL_COLUMNS.items()
        ):
            return rows
    return None


def list_sidecars(label_set: LabelSet) -> list[SidecarSpec]:
    """Specs of all sidecars of a label set.

    Raises:
        EditedSpecError: if a spec does not have the key of its folder.
    """
    keys = label_set.objects.directories(f"{label_set.prefix}/sidecars")
    return [read_spec(label_set, key) for key in keys]


def read_spec(label_set: LabelSet, key: str) -> SidecarSpec:
    """The spec of a sidecar by its key.

    Raises:
        EditedSpecError: if it is missing or does not have the key of its folder.
    """
    path = spec_path(label_set, key)
    name = f"{label_set.objects.uri}/{path}"
    try:
        spec = SidecarSpec.model_validate(json.loads(label_set.objects.get(path)))
    except (FileNotFoundError, ValidationError, ValueError) as error:
        raise EditedSpecError(f"{name} is no spec: {error}") from error
    if spec.key != key:
        raise EditedSpecError(f"{name} has the key {spec.key}; it was edited")
    return spec


def spec_path(label_set: LabelSet, key: str) -> str:
    """Where the spec of a sidecar lies."""
    return f"{label_set.prefix}/sidecars/{key}/spec.json"


def _spec_bytes(spec: SidecarSpec) -> bytes:
    return canonical_json(spec).encode()
