"""Structured logs of a run: one folder per run, in it one JSONL file per process.

Processes of several hosts write into it over shared file systems, on which appends of two hosts to
one file may overwrite each other: hence a file for each. Lines begin with their time, so
``sort logs/RUN/*.jsonl`` is the whole story in order.
"""

import datetime
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.layout import PACKAGES

LOGS_DIRECTORY = "logs"

_context: ContextVar[dict[str, Any] | None] = ContextVar("distill_log_context", default=None)


@dataclass(frozen=True, slots=True)
class RunLog:
    """Where the processes of one run write their logs; it can be sent to any of them."""

    directory: str
    """Folder of the run's logs, on a file system that all its processes see."""
    run: str
    """Id of the run."""
    step: str = ""
    """What its lines say in ``step``, such as ``label``."""

    def start(self, process: str, **context: Any) -> None:
        """Write the log of this process from here on, to ``<process>-<host>-<pid>.jsonl``.

        Our own messages are kept from INFO on, those of libraries from WARNING on.

        Args:
            process: What this process is, such as ``driver`` or ``engine``.
            context: More ids that every line names, such as ``partition``.
        """
        stop_log()
        handler = _LogFile(self, process, context)
        logging.getLogger().addHandler(handler)
        for package in PACKAGES:
            logging.getLogger(package).setLevel(logging.INFO)


def stop_log() -> None:
    """Close the log of this process, if it writes one."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _LogFile)]:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def log_context(**context: Any) -> Iterator[None]:
    """Ids that every line of the block names, such as ``student`` or ``partition``."""
    token = _context.set({**(_context.get() or {}), **context})
    try:
        yield
    finally:
        _context.reset(token)


def fields(**values: Any) -> dict[str, Any]:
    """Facts beside the text of a message: ``log.info("text", extra=fields(samples=3))``."""
    return {"fields": values}


class _LogFile(logging.Handler):
    """Appends one JSON document per message; opened with the first one.

    A log that cannot be written (a full disk, a folder that went away) ends nothing.
    """

    def __init__(self, log: RunLog, process: str, context: dict[str, Any]) -> None:
        super().__init__()
        name = f"{process}-{platform.node()}-{os.getpid()}.jsonl"
        self._path = Path(log.directory) / name
        self._always = {
            "run": log.run,
            **({"step": log.step} if log.step else {}),
            **context,
            "process": process,
            "host": platform.node(),
            "pid": os.getpid(),
        }

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message is kept."""
        own = record.name.partition(".")[0] in PACKAGES
        return record.levelno >= (logging.INFO if own else logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message; each is one append, so lines of threads do not mix."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            **self._always,
        }
        line |= _context.get() or {}
        line |= {"logger": record.name, "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = logging.Formatter().formatException(record.exc_info)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, default=str) + "\n")
        except OSError:
            return
