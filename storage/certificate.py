"""Certificates: what a look at a sample of a label set found, stored beside its labels.

``label_sets/<label set key>/certificates/00000001.json`` and so on are created with put-if-absent
and never changed; the newest one counts. ``docs/certificate.md`` says what is measured and why the
limits are what they are; ``teacher_server/certify.py`` makes certificates.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from storage.agreement import Agreement
from storage.coverage import Coverage
from storage.drawing import Drawing
from storage.errors import FormatError, LabelStoreError, ShardCorruptError
from storage.label_set import LabelSet
from storage.qa import QaConfig
from storage.records import Document, parse, to_json
from storage.schema import FORMAT_VERSION
from storage.view import LabelView

_NAME = re.compile(r"[0-9]{8}\.json")


class UnfitLabelsError(LabelStoreError):
    """The newest certificate of a label set says that its labels are wrong."""


class Certificate(Document):
    """The result of one check of a label set."""

    damage: ClassVar[type[LabelStoreError]] = ShardCorruptError

    format: Literal[1] = FORMAT_VERSION
    label_set: str
    number: int = Field(ge=1)
    """Certificates of a set are numbered from 1; the one with the largest number counts."""
    commit: int = Field(ge=1)
    """Last record of the history when the samples were chosen."""
    num_samples: int = Field(ge=1)
    """Samples that the set held then."""
    verdict: Literal["fit", "unfit"]
    reasons: tuple[str, ...]
    """Why the labels are unfit; empty if they are fit."""
    settings: QaConfig
    agreement: Agreement | None
    """Labels against a dense recomputation; None where every sample breaks the format."""
    drawing: Drawing | None
    """Sampled tokens against labels; likewise."""
    coverage: Coverage | None
    """How much is stored; likewise."""
    created_at: str
    """UTC, ISO 8601; information only."""
    provenance: dict[str, str]
    """Engine that scored the samples again, device, versions, host; information only."""


def newest_certificate(label_set: LabelSet) -> Certificate | None:
    """The certificate that counts, None if the set was never certified.

    Raises:
        FormatError: if it is malformed or lies in the wrong place.
        ShardCorruptError: if it is damaged.
    """
    paths = list(label_set.objects.paths(_folder(label_set)))
    return _read(label_set, paths[-1]) if paths else None


def is_current(label_set: LabelSet, certificate: Certificate) -> bool:
    """Whether no sample was added since the certificate was made.

    Compaction and repair change where samples lie, or remove some; neither makes new ones.
    """
    label_set.refresh()
    records = label_set.log.walk(certificate.commit + 1)
    # a record that removes shards only rearranges what they held
    return not any(record.num_shards and not record.removed for record in records)


def is_fit(label_set: LabelSet) -> bool:
    """Whether the labels may be used: false if the newest certificate refuses them.

    A set without a certificate may be used: it may come from a teacher that transformers cannot
    run, or be checked later.
    """
    certificate = newest_certificate(label_set)
    return certificate is None or certificate.verdict == "fit"


def require_fit(label_set: LabelSet) -> None:
    """Refuse labels that are known to be wrong.

    Raises:
        UnfitLabelsError: with the reasons, if the newest certificate refuses them.
    """
    certificate = newest_certificate(label_set)
    if certificate is not None and certificate.verdict == "unfit":
        listed = "\n  ".join(certificate.reasons)
        raise UnfitLabelsError(
            f"label set {label_set.key} is unfit by its certificate {certificate.number}:\n  "
            f"{listed}\nlook at it with `distill show {label_set.key[:12]}`; remove the set with "
            "`distill rm` and label it anew, or check it again with `distill certify --force`"
        )


def require_fit_samples(view: LabelView, sample_keys: Sequence[str]) -> None:
    """Refuse samples if any label set that serves some of them is known to be wrong.

    Whoever trains on labels asks this first; there is no way around it but another certificate.

    Args:
        view: Label sets that answer a request.
        sample_keys: What is about to be read; samples that are not stored are left out.

    Raises:
        UnfitLabelsError: with the reasons, if the newest certificate of a set refuses it.
        FormatError, ShardCorruptError: if that certificate is damaged.
    """
    for label_set in view.serving(sample_keys):
        require_fit(label_set)


def damaged_certificates(label_set: LabelSet) -> Iterator[tuple[str, str]]:
    """Path and error of every certificate that is damaged or lies in the wrong place."""
    for path in label_set.objects.paths(_folder(label_set)):
        try:
            _read(label_set, path)
        except (FormatError, ShardCorruptError) as error:
            yield path, str(error)


def give_up_certificate(label_set: LabelSet, path: str) -> None:
    """Remove a damaged certificate, so that the set is certified again.

    If it is the newest, older ones go too: what counted is unknown, and none of them may count in
    its place. It goes last, so that whoever is killed in between is asked to repair again.

    Raises:
        StoreAccessError: if the store cannot be written.
    """
    paths = list(label_set.objects.paths(_folder(label_set)))
    if paths and path == paths[-1]:
        for older in paths:
            label_set.objects.delete(older)
    label_set.objects.delete(path)


def publish_certificate(label_set: LabelSet, make: Callable[[int], Certificate]) -> Certificate:
    """Store a certificate under the next number.

    Args:
        label_set: The set.
        make: Makes the certificate of a number; called again if somebody else took the number.

    Raises:
        StoreAccessError: if it cannot be written.
    """
    newest = max(map(_number, label_set.objects.paths(_folder(label_set))), default=0)
    while True:
        newest += 1
        path = f"{_folder(label_set)}/{newest:08d}.json"
        data = to_json(make(newest))
        # a request whose answer was lost is sent again and then finds its own certificate
        if label_set.objects.create(path, data) or label_set.objects.get(path) == data:
            return _read(label_set, path)


def _read(label_set: LabelSet, path: str) -> Certificate:
    name = f"{label_set.objects.uri}/{path}"
    try:
        found = parse(Certificate, label_set.objects.get(path), name=name)
    except FileNotFoundError as error:
        raise FormatError(f"{name} vanished while it was read; try again") from error
    if (found.label_set, found.number) != (label_set.key, _number(path)):
        raise FormatError(
            f"{name} is certificate {found.number} of label set {found.label_set}; it was renamed: "
            "run `distill repair`"
        )
    return found


def _folder(label_set: LabelSet) -> str:
    return f"{label_set.prefix}/certificates"


def _number(path: str) -> int:
    """Number of a certificate by its name, 0 for a name that none has."""
    name = path.rpartition("/")[2]
    return int(name.removesuffix(".json")) if _NAME.fullmatch(name) else 0
