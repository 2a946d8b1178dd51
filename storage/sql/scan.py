"""How DuckDB asks for some columns of some rows, and gets them from Python.

DuckDB scans every subclass of ``pyarrow.dataset.Dataset`` by calling its ``scanner`` with the
columns that the query needs and the condition that its rows must meet, and reads the batches of the
answer one after the other. So a view needs no files of its own: it makes the batches on demand.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset

Rows = npt.NDArray[np.int64]
"""Numbers of rows, ascending."""


@dataclass(frozen=True)
class Request:
    """What a query needs of a view."""

    schema: pa.Schema
    """Of the whole view."""
    columns: tuple[str, ...]
    """Names of the columns to yield, in order."""
    condition: pyarrow.dataset.Expression | None
    """What every yielded row must meet."""

    @property
    def projected(self) -> pa.Schema:
        """Schema of what is yielded."""
        return pa.schema([self.schema.field(name) for name in self.columns])

    @cached_property
    def condition_columns(self) -> tuple[str, ...]:
        """Columns that the condition looks at."""
        if self.condition is None:
            return ()
        return tuple(name for name in self.schema.names if self._needs(name))

    def _needs(self, name: str) -> bool:
        """Whether the condition cannot be evaluated without a column."""
        rest = pa.schema([field for field in self.schema if field.name != name])
        try:
            _empty_dataset(rest).scanner(columns=[], filter=self.condition).to_table()
        except pa.ArrowInvalid:  # no match for the column
            return True
        return False

    def may_hold(self, guarantees: Sequence[pyarrow.dataset.Expression]) -> list[int]:
        """Numbers of those parts that may hold rows which meet the condition.

        Args:
            guarantees: What all rows of a part meet, one expression per part.
        """
        if self.condition is None:
            return list(range(len(guarantees)))
        kind = pyarrow.dataset.IpcFileFormat()
        nowhere = pa.fs.LocalFileSystem()  # only the expressions are looked at, no file is opened
        parts = [
            kind.make_fragment(str(number), nowhere, partition_expression=guarantee)
            for number, guarantee in enumerate(guarantees)
        ]
        dataset = pyarrow.dataset.FileSystemDataset(parts, self.schema, kind, nowhere)
        return [int(part.path) for part in dataset.get_fragments(self.condition)]

    def rows(self, columns: Mapping[str, pa.Array]) -> Rows:
        """Numbers of the rows that meet the condition.

        Args:
            columns: At least ``condition_columns``, of equal lengths.
        """
        names = list(self.condition_columns)
        num_rows = len(next(iter(columns.values())))
        number = pa.array(np.arange(num_rows))
        if not names:  # a condition such as `false`
            table = pa.table({_NUMBER: number})
        else:
            arrays = [columns[name] for name in names]
            table = pa.Table.from_arrays([*arrays, number], names=[*names, _NUMBER])
        found: Rows = table.filter(self.condition)[_NUMBER].to_numpy()
        return found


_NUMBER = "row number"


def _empty_dataset(schema: pa.Schema) -> pyarrow.dataset.Dataset:
    return pyarrow.dataset.dataset(schema.empty_table())


class LazyDataset(pyarrow.dataset.Dataset):  # type: ignore[misc]  # pyarrow is untyped
    """A view whose rows are made when they are asked for.

    Args:
        schema: Of the view, as it is shown.
        cheapest: The column that costs least to read. DuckDB counts rows by reading the first one.
        failures: Where an error is kept that ends a scan: DuckDB passes on only its text.
    """

    def __init__(self, schema: pa.Schema, cheapest: str, failures: list[BaseException]) -> None:
        # the base class has nothing to set up: it stands for files, and here are none
        self.shown = schema.names
        first = schema.field(cheapest)
        self._lazy_schema = pa.schema([first, *(field for field in schema if field != first)])
        self._failures = failures

    @property
    def schema(self) -> pa.Schema:
        """Of the view."""
        return self._lazy_schema

    @abstractmethod
    def batches(self, request: Request) -> Iterable[pa.RecordBatch]:
        """The rows that meet the condition, with exactly the columns that are asked for."""

    def scanner(
        self,
        columns: Sequence[str] | None = None,
        filter: pyarrow.dataset.Expression | None = None,  # noqa: A002 - Arrow's name
        **_: object,
    ) -> "_Scanner":
        """What DuckDB calls, with what it needs."""
        names = self.schema.names if columns is None else columns
        return _Scanner(self, Request(self.schema, tuple(names), filter), self._failures)


class _Scanner:
    """The part of ``pyarrow.dataset.Scanner`` that DuckDB uses."""

    def __init__(
        self, dataset: LazyDataset, request: Request, failures: list[BaseException]
    ) -> None:
        self._dataset, self._request, self._failures = dataset, request, failures

    @property
    def projected_schema(self) -> pa.Schema:
        """Schema of the batches."""
        return self._request.projected

    def to_reader(self) -> pa.RecordBatchReader:
        """The batches, made while they are read."""
        return pa.RecordBatchReader.from_batches(self.projected_schema, self._guarded())

    def _guarded(self) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._dataset.batches(self._request)
        except GeneratorExit:
            raise
        except BaseException as error:  # kept, and raised again behind DuckDB
            self._failures.append(error)
            raise
