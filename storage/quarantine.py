"""Samples that could not be labelled, and why: set aside, never dropped in silence.

One small document per sample lies beside the label set, ``quarantine/<sample key>.json``. Later
runs leave these samples out and say so, until somebody releases them.
"""

import re
from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

from pydantic import Field

from storage.errors import FormatError, LabelStoreError, ShardCorruptError
from storage.label_set import LabelSet
from storage.provenance import utc_now
from storage.records import Document, SampleKey, parse, to_json
from storage.schema import FORMAT_VERSION

_NAME = re.compile(r"[0-9a-f]{32}\.json")

Reason = Literal["bad label", "engine died", "engine hung"]


class QuarantinedSample(Document):
    """Why a sample has no label."""

    damage: ClassVar[type[LabelStoreError]] = ShardCorruptError

    format: Literal[1] = FORMAT_VERSION
    label_set: str
    sample: SampleKey
    reason: Reason
    detail: str = Field(max_length=4000)
    """What was found."""
    created_at: str
    """UTC, ISO 8601."""
    provenance: dict[str, str]
    """Backend, engine version, host, ... of who gave it up."""


class Quarantine:
    """The samples of a label set that were set aside.

    Args:
        label_set: The set.
    """

    def __init__(self, label_set: LabelSet) -> None:
        self._set = label_set
        self._folder = f"{label_set.prefix}/quarantine"

    def add(self, key: str, reason: Reason, detail: str, provenance: dict[str, str]) -> None:
        """Set a sample aside; what is known of one that was set aside before stays.

        Raises:
            LabelStoreError: if the store cannot be written.
        """
        document = QuarantinedSample(
            label_set=self._set.key,
            sample=key,
            reason=reason,
            detail=detail[:4000],
            created_at=utc_now(),
            provenance=provenance,
        )
        self._set.objects.create(self._path(key), to_json(document))

    def keys(self) -> set[str]:
        """Sample keys that were set aside and have no label in this set by now."""
        named = [_key(path) for path in self._set.objects.paths(self._folder)]
        keys = [key for key in named if key]
        return set(self._set.missing(keys)) if keys else set()

    def samples(self) -> list[QuarantinedSample]:
        """What is known of all samples that were set aside, in key order.

        Raises:
            FormatError, ShardCorruptError: if a document is damaged.
        """
        return [self._read(self._path(key)) for key in sorted(self.keys())]

    def damaged(self) -> Iterator[tuple[str, str]]:
        """Path and error of every document that is damaged or lies in the wrong place."""
        for path in self._set.objects.paths(self._folder):
            try:
                self._read(path)
            except (FormatError, ShardCorruptError) as error:
                yield path, str(error)

    def give_up(self, path: str) -> None:
        """Remove a damaged document: the sample that it was about is asked for again.

        Raises:
            LabelStoreError: if the store cannot be written.
        """
        self._set.objects.delete(path)

    def release(self, keys: Iterable[str]) -> None:
        """Let samples be asked for again.

        Raises:
            LabelStoreError: if the store cannot be written.
        """
        for key in keys:
            self._set.objects.delete(self._path(key))

    def _read(self, path: str) -> QuarantinedSample:
        name = f"{self._set.objects.uri}/{path}"
        try:
            found = parse(QuarantinedSample, self._set.objects.get(path), name=name)
        except FileNotFoundError as error:
            raise FormatError(f"{name} vanished while it was read; try again") from error
        if (found.label_set, found.sample) != (self._set.key, _key(path)):
            raise FormatError(
                f"{name} is about sample {found.sample} of label set {found.label_set}: it was "
                "renamed; run `distill repair`"
            )
        return found

    def _path(self, key: str) -> str:
        return f"{self._folder}/{key}.json"


def _key(path: str) -> str | None:
    """Sample key of a document by its name, None for a name that none has."""
    name = path.rpartition("/")[2]
    return name.removesuffix(".json") if _NAME.fullmatch(name) else None
