"""A project on disk: its resolved settings, its run folder and the story of its runs."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from pipeline.config import RunConfig
from pipeline.progress import Bars
from pipeline.status import State, StatusBoard, StepStatus
from pipeline.stopping import StoppedError
from storage.errors import DistillError
from storage.files import write_atomically
from storage.fingerprint import DigestMemo
from storage.objects import REMOTE_SCHEMES
from storage.provenance import provenance, utc_now
from storage.store import LabelStore


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

    @property
    def store(self) -> LabelStore:
        """The label store, created if it is a missing local directory."""
        return LabelStore(self.store_uri, create=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the run folder; writes what is run before the first step.

        Raises:
            DistillError: if another process is working in the same folder.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.directory / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise DistillError(
                f"another distill process is working in {self.directory}; wait until it ends, or "
                "use another name for this project"
            ) from None
        try:
            self.write_json("config.json", self.config.model_dump(mode="json"))
            facts = provenance()
            self.write_json("provenance.json", facts)
            self._board = StatusBoard(
                self.store.objects,
                project=self.config.name,
                directory=self.directory,
                command=facts["command"],
                warn=self.say,
            )
            with self._board.running():
                yield
        finally:
            self._board = None
            lock.release()

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
            stream.write(json.dumps({"time": utc_now(), "event": event, **facts}) + "\n")

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
        self.note("started", step=step, **facts)
        started_at, started = utc_now(), time.perf_counter()

        def tell(state: State, note: str = "") -> float:
            seconds = round(time.perf_counter() - started, 2)
            if self._board is not None:
                shown = None if state == "running" else seconds
                status = StepStatus(state=state, started_at=started_at, seconds=shown, note=note)
                self._board.step(step, status)
            return seconds

        tell("running")
        try:
            yield cost
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"[:2000]
            tell("stopped" if isinstance(error, StoppedError) else "failed", reason)
            self.note("failed", step=step, **facts, error=reason)
            raise
        self.note("finished", step=step, **facts, seconds=tell("finished"), **cost)

    def bars(self) -> Bars:
        """Progress bars for people here, and for ``distill status`` anywhere."""
        return Bars(self.console, tell=None if self._board is None else self._board.progress)

    def say(self, text: str) -> None:
        """Show one line to the user."""
        self.console.print(text, highlight=False)


def _event(line: str) -> dict[str, Any] | None:
    try:
        event: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return event


def teacher_forward_tokens(events: list[dict[str, Any]]) -> int:
    """Tokens that went through a teacher in all these events, prompts included."""
    return sum(int(event.get("teacher_forward_tokens", 0)) for event in events)
