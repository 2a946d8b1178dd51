"""Checkpoints of a training: whole or absent, and only loadable into the run that wrote them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from storage.files import fsync_directory, write_atomically
from student_train.errors import StudentError

POINTER = "latest.json"
STATE = "distillcache"
"""Key of what is ours in the client state of a DeepSpeed checkpoint."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: Folder of the run's checkpoints.
        identity: What must be equal to resume: digests of job, labels and steps, the world size.
    """

    def __init__(self, directory: Path, identity: dict[str, str]) -> None:
        self._directory = directory
        self._identity = identity
        self.state: dict[str, Any] = {}
        """What :meth:`save` was given beside the engine, after :meth:`load`; empty before."""

    def save(self, engine: Any, step: int, rank: int, state: dict[str, Any]) -> None:
        """Save the engine and ``state`` after ``step`` steps; call on every rank.

        ``state`` is what moves with the steps beside the engine, plain JSON values, equal on all
        ranks.

        The pointer moves only when all ranks have written, and the previous checkpoint is removed
        only after that, so a crash at any moment leaves a loadable one.
        """
        tag = f"step-{step:08d}"
        engine.save_checkpoint(
            str(self._directory), tag=tag, client_state={STATE: state}, save_latest=False
        )
        torch.distributed.barrier()
        if rank == 0:
            pointer = {"tag": tag, "step": step, **self._identity}
            write_atomically(self._directory / POINTER, json.dumps(pointer).encode())
            for old in self._directory.glob("step-*"):
                if old.name != tag:
                    shutil.rmtree(old)
            fsync_directory(self._directory)

    def load(self, engine: Any) -> int:
        """Restore the last checkpoint; returns the number of finished steps, 0 without one.

        Raises:
            StudentError: if the checkpoint belongs to another job, label set or world size.
        """
        file = self._directory / POINTER
        if not file.exists():
            return 0
        pointer = json.loads(file.read_text())
        for name, wanted in self._identity.items():
            if pointer.get(name) != wanted:
                raise StudentError(
                    f"{file} was written for {name} {pointer.get(name)!r}, this run has "
                    f"{wanted!r}; remove the folder {self._directory} to start anew"
                )
        _, client_state = engine.load_checkpoint(str(self._directory), tag=pointer["tag"])
        self.state = client_state[STATE]
        return int(pointer["step"])

    def remove(self) -> None:
        """Delete all checkpoints: the exported model replaces them."""
        shutil.rmtree(self._directory, ignore_errors=True)
