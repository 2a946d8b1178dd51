"""Label rows with the columns of an export, for :func:`storage.export.to_duckdb`."""

from collections.abc import Iterator

import pyarrow as pa

from storage.export import scan
from storage.label_set import LabelSet
from storage.sql.scan import LazyDataset, Request


class ExportRows(LazyDataset):
    """What one label set serves at the moment at which it is read.

    Args:
        label_set: The set.
        schema: Columns that may be asked for.
    """

    def __init__(self, label_set: LabelSet, schema: pa.Schema) -> None:
        numbers = [field.name for field in schema if pa.types.is_primitive(field.type)]
        super().__init__(schema, (numbers or schema.names)[0], [])
        self._label_set = label_set

    def batches(self, request: Request) -> Iterator[pa.RecordBatch]:
        """See the base class."""
        names = list(dict.fromkeys([*request.condition_columns, *request.columns]))
        for batch in scan(self._label_set, names or self.schema.names[:1]):
            found = batch
            if request.condition is not None:
                found = batch.take(pa.array(request.rows(dict(zip(names, batch.columns)))))  # noqa: B905
            yield found.select(list(request.columns)).cast(request.projected)
