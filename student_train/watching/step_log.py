"""Files with one line per optimiser step, each step once, also after a crash."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.files import write_atomically


class StepLog:
    """A JSONL file whose lines have a ``step``; written by rank 0 alone.

    Args:
        path: The file.
        finished_steps: Steps that the loaded checkpoint contains; lines of later ones are dropped,
            and so is a line that a crash cut short.
    """

    def __init__(self, path: Path, finished_steps: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("}\n")]
        kept = [line for line in kept if json.loads(line)["step"] <= finished_steps]
        write_atomically(path, "".join(kept).encode())
        self._path = path

    def lines(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def add(self, line: Mapping[str, Any]) -> None:
        """Append one line; it is visible to readers at once."""
        with self._path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
