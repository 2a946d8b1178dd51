"""A project on disk: its resolved settings, its run folder and the story of its runs."""

import contextlib
import datetime
import errno
import json
import logging
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from pipeline.config import RunConfig
from pipeline.logs import LOGS_DIRECTORY, RunLog, fields, log_context, stop_log
from pipeline.metrics import Metrics
from pipeline.progress import Bars
from pipeline.run_folder import holder, write_guide, write_run
from pipeline.status import State, StatusBoard, StepStatus
from pipeline.stopping import StoppedError
from pipeline.text import error_text
from storage.errors import DistillError, StoreAccessError
from storage.files import write_atomically
from storage.fingerprint import DigestMemo
from storage.objects import REMOTE_SCHEMES
from storage.provenance import provenance, utc_now
from storage.store import LabelStore

log = logging.getLogger(__name__)

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""What a user can mend: full, over quota, read-only, forbidden, broken."""


class Project:
    """What every step needs to know.

    Args:
        config: The checked configuration. Relative paths in it start at the current directory.
        console: Where progress and results are shown.
    """

    def __init__(self, config: RunConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.directory = Path(config.runs).absolute() / config.name
        self.memo = DigestMemo(self.directory / "digests.json")
        remote = config.store.startswith(REMOTE_SCHEMES)
        self.store_uri = config.store if remote else str(Path(config.store).absolute())
        self._board: StatusBoard | None = None
        self._store_seen = False
        self.run_id = _new_run_id()
        """Of this process's run; every event and every line of its logs names it."""
        self.metrics = Metrics(config.name, self.run_id)
        self._at = ""
        self._noted: BaseException | None = None
        self._tell: Callable[..., None] = lambda state, **more: None

    @property
    def store(self) -> LabelStore:
        """The label store, created if it is a local directory that is missing when a run begins.

        Raises:
            StoreAccessError: if it was there before and is gone; an empty one in its place would
                hide it.
        """
        found = LabelStore(self.store_uri, create=not self._store_seen)
        if not found.objects.exists:
            raise StoreAccessError(
                f"store {self.store_uri!r} is gone, it was there when the run began"
            )
        self._store_seen = True
        return found

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the run folder; writes what is run before the first step, and how it ended.

        Raises:
            DistillError: if another process is working in the same folder, or the folder cannot
                be written.
        """
        with self.ways_out():
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.directory / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                who = holder(self.directory)
                raise DistillError(
                    f"another distill process is working in {self.directory}"
                    f"{f' ({who})' if who else ''}; wait until it ends, or use another name for "
                    "this project"
                ) from None
            try:
                with self._story():
                    yield
            finally:
                self._board = None
                stop_log()
                lock.release()

    @contextmanager
    def _story(self) -> Iterator[None]:
        """Tell of the run while it goes on: settings, log, state in the store, ``run.json``."""
        facts = provenance()
        self.write_json("config.json", self.config.model_dump(mode="json"))
        self.write_json("provenance.json", facts)
        write_guide(self.directory, self.config.name)
        run = {
            "run": self.run_id,
            "project": self.config.name,
            "host": platform.node(),
            "process": os.getpid(),
            "command": facts["command"],
            "started_at": utc_now(),
        }
        self._tell = lambda state, **more: write_run(
            self.directory, {**run, **more}, state=state, events=self.events()
        )
        self.log_for().start("driver")
        self.note("run started", command=facts["command"])
        self._tell("running")
        state: State = "failed"
        ended: dict[str, Any] = {}
        try:
            self._board = StatusBoard(
                self.store.objects,
                project=self.config.name,
                directory=self.directory,
                command=facts["command"],
                warn=self.say,
            )
            with self._board.running():
                yield
            state = "finished"
        except BaseException as error:
            state = "stopped" if isinstance(error, StoppedError) else "failed"
            ended = {"error": error_text(error)}
            self._failed(error)
            raise
        finally:
            ended["ended_at"] = utc_now()
            with contextlib.suppress(OSError):  # what is being raised says more
                self.note("run ended", state=state)
                self._tell(state, **ended)

    def _failed(self, error: BaseException) -> None:
        """Log why the run ends, and note it where no step has: nothing fails without a reason."""
        log.error("run ends: %s", error_text(error), exc_info=error)
        if error is not self._noted and self._at:
            with contextlib.suppress(OSError):
                self.note("failed", step=self._at, error=error_text(error))

    @contextmanager
    def ways_out(self) -> Iterator[None]:
        """Disks and stores that are full, gone or read-only are the user's to mend: say so."""
        try:
            yield
        except StoreAccessError as error:
            raise StoreAccessError(
                f"{error}. Labels and selections are written to the store {self.store_uri}: once "
                "it can be reached and written, the same command goes on where it stopped"
            ) from error
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise DistillError(
                f"the disk refuses: {error}; free or unlock it (the run folder is "
                f"{self.directory}) and run the command again, it goes on where it stopped"
            ) from error

    @contextmanager
    def at(self, step: str) -> Iterator[None]:
        """What fails in the block, fails in this step, also before the step has begun to work."""
        before, self._at = self._at, step
        with log_context(step=step):
            yield
        self._at = before  # not after a failure: it is noted where it happened

    def log_for(self, step: str = "") -> RunLog:
        """Where a process that works for a step of this run writes its log."""
        return RunLog(str(self.directory / LOGS_DIRECTORY / self.run_id), self.run_id, step)

    # -- the run folder ---------------------------------------------------------------------------
    def write_json(self, name: str, value: Any) -> Path:
        """Replace a JSON file of the run folder in one step."""
        path = self.directory / name
        write_atomically(path, json.dumps(value, indent=1).encode())
        return path

    def read_json(self, name: str) -> Any:
        """A JSON file of the run folder, ``None`` if it is not there yet."""
        path = self.directory / name
        return json.loads(path.read_text()) if path.is_file() else None

    # -- the story of the run ---------------------------------------------------------------------
    def note(self, event: str, **facts: Any) -> None:
        """Append one line to ``events.jsonl``: what happened, when, and what it cost."""
        path = self.directory / "events.jsonl"
        before = path.read_text() if path.is_file() else ""
        cut_short = before != "" and not before.endswith("\n")
        with path.open("a") as stream:
            stream.write("\n" * cut_short)
            told = {"time": utc_now(), "run": self.run_id, "event": event, **facts}
            stream.write(json.dumps(told) + "\n")
        log.info("%s", event, extra=fields(**facts))

    def events(self) -> list[dict[str, Any]]:
        """All events so far; a line that a crash cut short is left out."""
        path = self.directory / "events.jsonl"
        if not path.is_file():
            return []
        return [event for event in map(_event, path.read_text().split("\n")) if event is not None]

    @contextmanager
    def timed(self, step: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """Note a step with its wall time; the block may add facts such as token counts."""
        cost: dict[str, Any] = {}
        with self.at(step):
            self.note("started", step=step, **facts)
            started_at, started = utc_now(), time.perf_counter()

            def tell(state: State, note: str = "") -> float:
                seconds = round(time.perf_counter() - started, 2)
                if self._board is not None:
                    shown = None if state == "running" else seconds
                    status = StepStatus(
                        state=state, started_at=started_at, seconds=shown, note=note
                    )
                    self._board.step(step, status)
                if state != "running":
                    self.metrics.set("step_seconds", seconds, step=step)
                return seconds

            tell("running")
            try:
                yield cost
            except BaseException as error:
                reason = error_text(error)
                seconds = tell("stopped" if isinstance(error, StoppedError) else "failed", reason)
                self.metrics.add("step_failures_total", step=step)
                with contextlib.suppress(OSError):  # a full disk must not hide the error
                    self.note("failed", step=step, **facts, error=reason, seconds=seconds, **cost)
                self._noted = error
                raise
            self.note("finished", step=step, **facts, seconds=tell("finished"), **cost)
            self._tell("running")

    def bars(self) -> Bars:
        """Progress bars for people here, and for ``distill status`` anywhere."""
        return Bars(self.console, tell=None if self._board is None else self._board.progress)

    def say(self, text: str) -> None:
        """Show one line to the user."""
        self.console.print(text, highlight=False, markup=False)
        log.info("%s", text)


def _new_run_id() -> str:
    """Sorts by time; unique without asking anybody."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"


def _event(line: str) -> dict[str, Any] | None:
    try:
        event: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event


def teacher_forward_tokens(events: list[dict[str, Any]]) -> int:
    """Tokens that went through a teacher in all these events, prompts included."""
    return sum(int(event.get("teacher_forward_tokens", 0)) for event in events)
