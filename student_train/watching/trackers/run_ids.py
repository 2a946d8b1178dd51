"""The ids that services gave a training, kept in its output directory until it is removed."""

import json
from pathlib import Path

from storage.files import write_atomically

FILE = "trackers.json"


def stored_id(directory: Path, service: str) -> str | None:
    """The id under which a service knows this training; None before it was asked."""
    file = directory / FILE
    ids = json.loads(file.read_text()) if file.is_file() else {}
    return ids.get(service)


def store_id(directory: Path, service: str, run_id: str) -> None:
    """Remember an id for a resume."""
    file = directory / FILE
    ids = json.loads(file.read_text()) if file.is_file() else {}
    write_atomically(file, json.dumps({**ids, service: run_id}).encode())
