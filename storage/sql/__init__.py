"""A store as a DuckDB database: views that are read lazily, verified, and never written.

* ``database.py``: the connection, its views and queries;
* ``scan.py``: how DuckDB asks for some columns of some rows;
* ``labels.py``, ``topk.py``, ``sample_rows.py``: one file per view;
* ``snapshot.py``: what of a label set a query sees;
* ``sources.py``, ``texts.py``: where prompts came from, and the text of tokens.

To add a view, write its dataset here and add one line to ``VIEWS`` in ``database.py``.
"""

from storage.sql.database import Database, Result, SqlError, open_database

__all__ = ["Database", "Result", "SqlError", "open_database"]
