"""A store as a DuckDB database in memory: its views, and queries that only read."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import duckdb
import pyarrow as pa

from storage.errors import DistillError
from storage.sql.labels import LabelRows
from storage.sql.sample_rows import SampleRows
from storage.sql.snapshot import Snapshot
from storage.sql.sources import Sources
from storage.sql.texts import Texts, Tokenizers
from storage.sql.topk import TopKRows
from storage.store import LabelStore

VIEWS: Final = {"labels": LabelRows, "samples": SampleRows, "topk": TopKRows}

SETTINGS: Final[Mapping[str, str]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
}
"""No files, no network, no extensions, and no variables of the Python program."""

TABLE_FUNCTIONS: Final = frozenset(
    [
        *("range", "generate_series", "unnest", "repeat", "json_each", "json_tree", "summary"),
        *("duckdb_columns", "duckdb_functions", "duckdb_keywords", "duckdb_settings"),
        *("duckdb_tables", "duckdb_types", "duckdb_views", "pragma_table_info", "pragma_version"),
    ]
)
"""What a query may call instead of a table; others read files or memory, or run text as SQL."""

BATCH_ROWS: Final = 2**16
"""Rows of a batch of a result."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED = frozenset(
    ["main", "temp", "system", "memory", "information_schema", "pg_catalog", *VIEWS]
)


class SqlError(DistillError):
    """A query cannot be answered as it was asked."""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to a query, made while it is read."""

    schema: pa.Schema
    """Columns, in order."""
    batches: Iterator[pa.RecordBatch]
    """Rows; reading them raises what the query raises."""

    def table(self) -> pa.Table:
        """All rows."""
        return pa.Table.from_batches(list(self.batches), schema=self.schema)


class Database:
    """Views over a store, as it was when this was opened; a context manager that closes them.

    Everything is read when a query needs it: some columns of some shards, verified. The views
    ``labels``, ``samples`` and ``topk`` hold all given sets; ``NAME.labels`` and so on hold the set
    of that name.

    Args:
        snapshots: The label sets.
        notes: Where remarks for the user appear, also while a query is read.
        tables: More views, by name.
    """

    def __init__(
        self, snapshots: Sequence[Snapshot], notes: list[str], tables: Mapping[str, pa.Table]
    ) -> None:
        self.notes = notes
        self._failures: list[BaseException] = []
        self.connection = duckdb.connect(config=dict(SETTINGS))
        named = {snapshot.name: [snapshot] for snapshot in snapshots if snapshot.name is not None}
        for schema, sets in {"main": snapshots, **named}.items():
            if schema != "main":
                self.connection.execute(f'create schema "{schema}"')
            for view, kind in VIEWS.items():
                source, rows = f"{view} of {schema}", kind(sets, self._failures)
                self.connection.register(source, rows)
                columns = ", ".join(rows.shown)
                self.connection.execute(
                    f'create view "{schema}"."{view}" as select {columns} from "{source}"'  # noqa: S608
                )
        for view, table in tables.items():
            source = f"{view} of main"
            self.connection.register(source, table)
            self.connection.execute(f'create view "{view}" as select * from "{source}"')  # noqa: S608
        self.connection.execute("set lock_configuration = true")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget the views."""
        self.connection.close()

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> Result:
        """Ask one question.

        Args:
            sql: One SELECT statement (or VALUES, FROM, DESCRIBE, SUMMARIZE, SHOW, EXPLAIN).
            parameters: Values of ``$name`` in it.

        Raises:
            SqlError: if it is no such statement, or DuckDB refuses it.
            ShardCorruptError: if something that is read is not what was committed.
        """
        try:
            self._require_readonly(sql)
            answer = self.connection.sql(sql, params=dict(parameters) if parameters else None)
            reader = answer.to_arrow_reader(BATCH_ROWS)
        except duckdb.Error as error:
            raise self._refusal(error) from error
        return Result(reader.schema, self._batches(reader))

    def _batches(self, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        try:
            yield from reader
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: BaseException) -> BaseException:
        """What to raise instead of an error of DuckDB: what made it fail, if that was ours."""
        if self._failures:
            return self._failures.pop()
        text = str(error).strip()
        if isinstance(error, duckdb.CatalogException) and "Table with name" in text:
            text += f"\nViews: {', '.join(self.views())}"
        return SqlError(text)

    def views(self) -> list[str]:
        """Names of all views."""
        rows = self.connection.execute(
            "select schema_name, view_name from duckdb_views() where not internal "
            "and not temporary order by schema_name != 'main', schema_name, view_name"
        ).fetchall()
        return [view if schema == "main" else f"{schema}.{view}" for schema, view in rows]

    def _require_readonly(self, sql: str) -> None:
        """Refuse everything but one question.

        Raises:
            SqlError: saying what is refused.
        """
        statements = self.connection.extract_statements(sql)
        if len(statements) != 1:
            raise SqlError(f"one SQL statement was expected, found {len(statements)}")
        kind = statements[0].type
        if kind not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
            raise SqlError(f"only questions are answered, such as SELECT; this is {kind.name}")
        for function in sorted(self._table_functions(sql)):
            if function not in TABLE_FUNCTIONS:
                raise SqlError(
                    f"the table function {function!r} cannot be used here: queries read the views "
                    f"{', '.join(self.views())}"
                )

    def _table_functions(self, sql: str) -> set[str]:
        """Names of functions that a statement calls instead of a table."""
        rest = re.sub(r"^\s*explain(\s+analyze)?\s", "", sql, flags=re.IGNORECASE)
        (text,) = self.connection.execute("select json_serialize_sql($1)", [rest]).fetchall()[0]
        tree = json.loads(text)
        if tree["error"]:
            raise SqlError(f"only questions are answered, such as SELECT: {tree['error_message']}")
        return set(_functions(tree))


def _functions(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for part in node:
            yield from _functions(part)
    elif isinstance(node, dict):
        if node.get("type") == "TABLE_FUNCTION":
            yield node["function"]["function_name"].lower()
        for part in node.values():
            yield from _functions(part)


def open_database(
    store: LabelStore,
    sets: Mapping[str, str] | None = None,
    *,
    tokenizers: Sequence[Path] = (),
    models: Sequence[Path] = (),
    tables: Mapping[str, pa.Table] | None = None,
) -> Database:
    """A store as a database, as it is now.

    Args:
        store: The store, local or remote; labelling may go on.
        sets: Names for queries and the keys of label sets, or unique beginnings of them: only these
            are looked at. All sets of the store, without names, by default.
        tokenizers: Directories of tokenizers that the user names, for the text of tokens.
        models: Directories that may hold one.
        tables: More views, by name, such as the runs of a project.

    Raises:
        SqlError: if a name cannot be one.
        LabelStoreError: if a set does not exist or is damaged.
        ConfigError: if a named directory has no tokenizer.
    """
    for alias in sets or ():
        if not _NAME.fullmatch(alias) or alias.lower() in _RESERVED:
            raise SqlError(
                f"{alias!r} cannot be the name of a label set; take letters, digits and _, and "
                f"none of {', '.join(sorted(_RESERVED))}"
            )
    notes: list[str] = []

    def note(text: str) -> None:
        if text not in notes:
            notes.append(text)

    found = Tokenizers(tokenizers, models, note)
    sources = Sources(store)
    wanted: list[tuple[str | None, str]] = (
        list(sets.items()) if sets else [(None, key) for key in store.keys()]  # noqa: SIM118
    )
    snapshots = []
    for name, key in wanted:
        label_set = store.open(key)
        snapshots.append(Snapshot(label_set, name, sources, Texts(found, label_set.document)))
    return Database(snapshots, notes, tables or {})
