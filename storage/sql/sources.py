"""Where the prompts of a store came from: what its selections say of samples."""

from functools import cached_property
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.ipc import ArrowFile
from storage.selection import SELECTION_SCHEMA
from storage.store import LabelStore

SOURCE_FIELDS = [
    pa.field("domain", pa.string()),
    pa.field("source_file", pa.string()),
    pa.field("source_line", pa.int32()),
    pa.field("source_id", pa.string()),
]
"""Of the first row, by file, line and id, that asked for a sample in any selection of the store;
null where no selection names it. The domain is the name of the file without folder and ending."""

_READ = ["sample_key", "source_file", "source_line", "source_id"]


class Sources:
    """Sources of samples by sample key, read when they are first asked for.

    Args:
        store: The store, whose selections are read.
    """

    def __init__(self, store: LabelStore) -> None:
        self._store = store

    def of(self, keys: pa.Array) -> dict[str, pa.Array]:
        """Columns of ``SOURCE_FIELDS`` for some sample keys.

        Raises:
            ShardCorruptError, FormatError: if a selection is damaged.
        """
        known, table = self._table
        wanted = np.array(keys.to_pylist(), "S32")
        place = np.searchsorted(known, wanted)
        found = np.zeros(len(wanted), np.bool_)
        inside = place < len(known)
        found[inside] = known[place[inside]] == wanted[inside]
        rows = pa.array(place, mask=~found)
        return {
            name: _one(table[name].take(rows)) for name in (field.name for field in SOURCE_FIELDS)
        }

    @cached_property
    def _table(self) -> tuple[npt.NDArray[np.bytes_], pa.Table]:
        """Distinct sample keys, ascending, and a row of ``SOURCE_FIELDS`` for each."""
        first: dict[str, tuple[str, int, str]] = {}
        for key in self._store.selections():
            for sample, source in self._read(key):
                first[sample] = min(source, first.get(sample, source))
        keys = sorted(first)
        files, lines, ids = ([first[key][part] for key in keys] for part in range(3))
        columns = [[PurePosixPath(str(name)).stem for name in files], files, lines, ids]
        arrays = [
            pa.array(values, field.type)
            for values, field in zip(columns, SOURCE_FIELDS, strict=True)
        ]
        return np.array(keys, "S32"), pa.Table.from_arrays(arrays, schema=pa.schema(SOURCE_FIELDS))

    def _read(self, key: str) -> list[tuple[str, tuple[str, int, str]]]:
        """Samples of a selection with their first source."""
        path = f"selections/{key}.arrow"
        objects = self._store.objects
        name = f"{objects.uri}/{path}"
        found = []
        with ArrowFile(objects.get(path), name=name, schema=SELECTION_SCHEMA) as file:
            columns = (column.to_pylist() for column in file.table(_READ).columns)
            for sample, *lists in zip(*columns, strict=True):
                sources = list(zip(*lists, strict=True))
                if sources:
                    found.append((sample, min(sources)))
        return found


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
