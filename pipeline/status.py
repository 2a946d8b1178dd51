"""The state of runs, kept in the store so that every machine that sees it can ask.

A run folder has one small object, which its run replaces at every step and as a sign of life. It
is a view, not a record: nothing depends on it, and a run goes on when it cannot be written.
"""

import datetime
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from pipeline.stopping import StoppedError
from storage.config import Config
from storage.errors import StoreAccessError
from storage.keys import key_of
from storage.objects import Objects
from storage.provenance import utc_now

PREFIX = "runs"
SIGN_OF_LIFE_S = 15.0
"""How often a run says that it lives."""
SILENT_S = 4 * SIGN_OF_LIFE_S
"""A run that has been silent for longer is taken for dead."""
PAUSE_S = 2.0
"""At least so long between two writes."""

State = Literal["running", "finished", "failed", "stopped"]


class StepStatus(Config):
    """One step of a run, or one piece of long work in it."""

    state: State
    started_at: str
    seconds: float | None = None
    """Wall time; ``None`` while it runs."""
    completed: int | None = None
    """Samples or optimiser steps that are done, if it counts any."""
    total: int | None = None
    """How many there will be."""
    note: str = ""
    """Rate, loss or error."""


class RunStatus(Config):
    """A run as it was when it was last heard of."""

    project: str
    host: str
    process: int
    directory: str
    """Of the run folder, on its host."""
    command: str
    state: State
    started_at: str
    heard_at: str
    steps: dict[str, StepStatus] = Field(default_factory=dict)
    """By name, in the order in which they started."""

    @property
    def name(self) -> str:
        """What tells the run folders of one project apart."""
        return key_of({"host": self.host, "directory": self.directory})[:12]

    def is_silent(self, now: datetime.datetime | None = None) -> bool:
        """Whether it should have been heard of: its process died, or its machine did."""
        now = now or datetime.datetime.now(datetime.UTC)
        heard = datetime.datetime.fromisoformat(self.heard_at)
        return self.state == "running" and (now - heard).total_seconds() > SILENT_S


def statuses(objects: Objects, project: str | None = None) -> list[RunStatus]:
    """All runs of a store, or of one project, the last one that was heard of first.

    What is no status of a run, or of a later version, is left out.
    """
    found = []
    for path in objects.paths(PREFIX if project is None else f"{PREFIX}/{project}"):
        try:
            found.append(RunStatus.model_validate_json(objects.get(path)))
        except (ValidationError, FileNotFoundError):
            continue
    return sorted(found, key=lambda status: status.heard_at, reverse=True)


class StatusBoard:
    """Tells the store how a run is doing.

    Args:
        objects: The store.
        project: Name of the project.
        directory: The run folder.
        command: The command line.
        warn: Told once if the store cannot be written.
    """

    def __init__(
        self,
        objects: Objects,
        *,
        project: str,
        directory: Path,
        command: str,
        warn: Callable[[str], None],
    ) -> None:
        now = utc_now()
        self._status = RunStatus(
            project=project,
            host=platform.node(),
            process=os.getpid(),
            directory=str(directory),
            command=command,
            state="running",
            started_at=now,
            heard_at=now,
        )
        self._objects, self._warn = objects, warn
        self._lock = threading.Lock()
        self._changed, self._ended = threading.Event(), threading.Event()
        self._warned = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Give signs of life until the block ends; how it ends is how the run ended."""
        heart = threading.Thread(target=self._beat, daemon=True)
        heart.start()
        state: State = "failed"
        try:
            yield
            state = "finished"
        except StoppedError:
            state = "stopped"
            raise
        finally:
            self._ended.set()
            self._changed.set()
            heart.join()
            self._status = self._status.model_copy(update={"state": state})
            self._write()

    def step(self, name: str, step: StepStatus) -> None:
        """Set the state of a step; returns at once."""
        with self._lock:
            steps = {**self._status.steps, name: step}
            self._status = self._status.model_copy(update={"steps": steps})
        self._changed.set()

    def progress(self, name: str, completed: int, total: int | None, note: str) -> None:
        """Set how far a piece of long work is; returns at once."""
        known = self._status.steps.get(name)
        step = StepStatus(
            state="finished" if total is not None and completed >= total else "running",
            started_at=utc_now() if known is None else known.started_at,
            completed=completed,
            total=total,
            note=note,
        )
        if step != known:
            self.step(name, step)

    def _beat(self) -> None:
        """Write what changed, now and then; a slow store holds up nobody else."""
        while not self._ended.is_set():
            self._changed.clear()
            self._write()
            self._changed.wait(SIGN_OF_LIFE_S)
            self._ended.wait(PAUSE_S)

    def _write(self) -> None:
        with self._lock:
            self._status = self._status.model_copy(update={"heard_at": utc_now()})
            status = self._status
        path = f"{PREFIX}/{status.project}/{status.name}.json"
        root = self._objects.root
        try:
            if root is not None and not root.is_dir():
                raise StoreAccessError(f"store {self._objects.uri!r} is gone")  # not made anew here
            self._objects.upload(path, status.model_dump_json(indent=1).encode())
        except StoreAccessError as error:
            if not self._warned:
                self._warned = True
                self._warn(f"note: `distill status` does not show this run: {error}")
