"""Checkpoints of a training: whole or absent, verified, and loadable into their own run only.

What a checkpoint holds: weights, master weights and moments (DeepSpeed's files), the random numbers
of every rank, and in its manifest what moves with the steps and what must be equal to go on. The
position in the data is the number of the step.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from storage.errors import StoreAccessError
from storage.files import fsync_directory, write_atomically
from storage.fingerprint import DigestMemo
from student_train.checkpoints.copies import CheckpointCopies
from student_train.checkpoints.manifest import (
    MANIFEST_FILE,
    FileDigest,
    Manifest,
    damage,
    differences,
    digest_file,
    files_in,
)
from student_train.checkpoints.random_state import (
    random_state,
    restore_random_state,
    seed_random_state,
)
from student_train.checkpoints.resume_settings import resume_settings
from student_train.checkpoints.universal import make_universal, remove_universal
from student_train.config import TrainJob
from student_train.engine import from_rank_0, gather_over_ranks, world
from student_train.errors import StudentError

CHECKPOINTS_DIRECTORY = "checkpoints"
"""Folder of the checkpoints, in the output directory of a training."""

DIGESTS_FILE = "digests.json"
TAGS = "step-*"


@dataclass(frozen=True, slots=True)
class SavedStep:
    """A checkpoint that was found whole, and fits this run."""

    manifest: Manifest
    directory: Path
    """Folder that DeepSpeed is given; the checkpoint is below it."""
    universal: bool
    """Whether it was converted, because another number of ranks wrote it."""

    @property
    def tag(self) -> str:
        """Its name."""
        return tag_of(self.manifest.step)


def tag_of(step: int) -> str:
    """Name of the checkpoint after ``step`` steps; names sort like steps."""
    return f"step-{step:08d}"


class Checkpoints:
    """The checkpoints of one run; every rank calls all methods.

    All ranks of all hosts see one output directory.

    Args:
        job: The training.
        plan_digest: Of all its steps.
    """

    def __init__(self, job: TrainJob, plan_digest: str) -> None:
        self._job, self._plan_digest = job, plan_digest
        self._directory = Path(job.output) / CHECKPOINTS_DIRECTORY
        self._keep = job.train.checkpoint.keep
        self._rank, self._world_size = world()
        self._copies = _copies_of(job)
        self._settings: dict[str, Any] | None = None

    def find(self) -> SavedStep | None:
        """The newest whole checkpoint of this run, ready to be loaded; None without any.

        A damaged one is passed over with a warning, for its copy or for the one before. Call it
        before the engine is made: whether a checkpoint is converted is among its settings.

        Raises:
            StudentError: if there are checkpoints and none is whole, or the newest whole one was
                written with other labels or settings.
        """
        from_rank_0(self._remove_leftovers)
        problems: list[str] = []
        for tag, is_copy in from_rank_0(self._candidates):
            directory = self._directory / tag
            problem = self._fetch(tag) if is_copy else None
            problem = problem or self._damage(directory)
            if problem is None:
                manifest = Manifest.load(directory)
                from_rank_0(partial(self._require_same, manifest))
                return self._prepared(manifest)
            problems.append(problem)
            if self._rank == 0:
                sys.stderr.write(f"warning: a checkpoint is damaged and passed over: {problem}\n")
                if is_copy:
                    shutil.rmtree(directory, ignore_errors=True)
        if problems:
            raise StudentError(
                f"no checkpoint in {self._places()} is whole ({problems[0]}); put an intact one "
                f"there, or remove {self._directory} to start from the first step"
            )
        return None

    def load(self, engine: Any, found: SavedStep) -> None:
        """Restore the engine and the random numbers of this rank."""
        engine.load_checkpoint(str(found.directory), tag=found.tag)
        own = self._directory / found.tag / _random_file(self._rank)
        if found.manifest.world_size == self._world_size:
            restore_random_state(json.loads(own.read_text()))
        else:
            step = found.manifest.step
            seed_random_state(self._job.train.seed, rank=self._rank, step=step)
        gather_over_ranks(None)  # nobody reads any more
        if self._rank == 0:
            remove_universal(self._directory)

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Save engine and ``state`` after ``step`` steps.

        The manifest is written when all ranks have written their files, and older checkpoints are
        removed only after that, so a crash at any moment leaves a loadable one.

        Args:
            engine: DeepSpeed's.
            step: Finished steps.
            state: What moves with the steps beside the engine: plain JSON values, equal on all
                ranks.
        """
        tag = tag_of(step)
        directory = self._directory / tag
        from_rank_0(partial(shutil.rmtree, directory, ignore_errors=True))
        engine.save_checkpoint(str(self._directory), tag=tag, save_latest=False)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(random_state())
        write_atomically(directory / _random_file(self._rank), text.encode())
        gather_over_ranks(None)  # all have written
        names = files_in(directory)
        parts = gather_over_ranks(_durable_digests(directory, self._share(names)))

        def commit() -> None:
            manifest = Manifest(
                step=step,
                world_size=self._world_size,
                settings=self._own_settings(),
                state=state,
                files={name: part[name] for part in parts for name in sorted(part)},
            )
            manifest.save(directory)

        from_rank_0(commit)
        self._copy(directory, names)
        from_rank_0(self._remove_old)

    def remove(self) -> None:
        """Delete all checkpoints and copies: the exported model replaces them."""
        if self._rank == 0:
            remove_checkpoints(self._job)

    def _candidates(self) -> list[tuple[str, bool]]:
        """Names of checkpoints, the newest first, and whether each is a copy."""
        found = [(tag, False) for tag in self._tags()]
        if self._copies is not None:
            try:
                found += [(tag, True) for tag in self._copies.tags()]
            except StoreAccessError as error:
                if not found:
                    raise
                sys.stderr.write(f"warning: copies of checkpoints are left out: {error}\n")
        return sorted(found, key=lambda candidate: (candidate[0], not candidate[1]), reverse=True)

    def _tags(self) -> list[str]:
        return sorted(path.parent.name for path in self._directory.glob(f"{TAGS}/{MANIFEST_FILE}"))

    def _fetch(self, tag: str) -> str | None:
        """Bring a copy here; returns what went wrong."""
        directory, copies = self._directory / tag, self._copies
        if copies is None:
            return None

        def bring_manifest() -> None:
            shutil.rmtree(directory, ignore_errors=True)
            copies.fetch_manifest(directory)

        from_rank_0(bring_manifest)
        problem = None
        try:
            copies.fetch(directory, self._share(Manifest.load(directory).files))
        except (StoreAccessError, FileNotFoundError, ValueError) as error:
            problem = f"{copies.uri}/{tag}: {error}"
        return _first(gather_over_ranks(problem))

    def _damage(self, directory: Path) -> str | None:
        """What is wrong with a checkpoint; every rank reads its share of the files."""
        try:
            manifest = Manifest.load(directory)
            problem = damage(directory, manifest, self._share(manifest.files))
        except ValueError as error:
            problem = f"{directory / MANIFEST_FILE} cannot be read: {error}"
        return _first(gather_over_ranks(problem))

    def _share(self, names: Iterable[str]) -> list[str]:
        """The files that this rank reads."""
        return sorted(names)[self._rank :: self._world_size]

    def _own_settings(self) -> dict[str, Any]:
        if self._settings is None:
            memo = DigestMemo(self._directory / DIGESTS_FILE)
            self._settings = resume_settings(self._job, self._plan_digest, memo)
        return self._settings

    def _require_same(self, manifest: Manifest) -> None:
        found = differences(manifest.settings, self._own_settings())
        if found:
            lines = "".join(f"\n  {line}" for line in found)
            raise StudentError(
                f"{self._directory / tag_of(manifest.step)} was written by a training with other "
                f"settings or labels:{lines}\nPut back what the checkpoint says to go on, or "
                f"remove {self._places()} to start from the first step"
            )

    def _prepared(self, manifest: Manifest) -> SavedStep:
        """Convert where another number of ranks wrote it, and forget newer ones: they are damaged.

        Without ZeRO every rank has the whole state, in a file that serves any number of them.
        """
        universal = manifest.world_size != self._world_size and self._job.train.deepspeed.stage > 0
        tag = tag_of(manifest.step)

        def prepare() -> str:
            for newer in self._tags():
                if newer > tag:
                    shutil.rmtree(self._directory / newer)
            return str(make_universal(self._directory / tag) if universal else self._directory)

        return SavedStep(manifest, Path(from_rank_0(prepare)), universal)

    def _copy(self, directory: Path, names: Sequence[str]) -> None:
        """Copy a checkpoint; a store that cannot be reached does not hold up the training."""
        copies = self._copies
        if copies is None:
            return
        problem = None
        try:
            copies.upload(directory, self._share(names))
        except StoreAccessError as error:
            problem = str(error)
        problem = _first(gather_over_ranks(problem))

        def commit() -> None:
            try:
                if problem is not None:
                    raise StoreAccessError(problem)
                copies.commit(directory)
                copies.keep(self._tags()[-self._keep :])
            except StoreAccessError as error:
                sys.stderr.write(
                    f"warning: {directory.name} could not be copied, training goes on: {error}\n"
                )

        from_rank_0(commit)

    def _remove_old(self) -> None:
        for tag in self._tags()[: -self._keep]:
            # without a manifest it is a leftover, however far the rest comes
            (self._directory / tag / MANIFEST_FILE).unlink()
            shutil.rmtree(self._directory / tag)
        fsync_directory(self._directory)

    def _remove_leftovers(self) -> None:
        whole = self._tags()
        for path in self._directory.glob(TAGS):
            if path.name not in whole:
                shutil.rmtree(path)
        remove_universal(self._directory)

    def _places(self) -> str:
        copies = "" if self._copies is None else f" and {self._copies.uri}"
        return f"{self._directory}{copies}"


def remove_checkpoints(job: TrainJob) -> None:
    """Delete all checkpoints of a training that is done, and their copies."""
    shutil.rmtree(Path(job.output) / CHECKPOINTS_DIRECTORY, ignore_errors=True)
    with suppress(StoreAccessError):  # it is done all the same
        if (copies := _copies_of(job)) is not None:
            copies.keep([])


def _copies_of(job: TrainJob) -> CheckpointCopies | None:
    uri, name = job.train.checkpoint.uri, Path(job.output).resolve().name
    return None if uri is None else CheckpointCopies(uri, name)


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.json"


def _first(problems: Sequence[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def _durable_digests(directory: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Digests of files that are on disk, whatever happens to the machine."""
    for name in names:
        with (directory / name).open("rb") as stream:
            os.fsync(stream.fileno())
    return {name: digest_file(directory / name) for name in names}
