"""What the certificates say of the label sets that a project reads."""

from collections.abc import Iterable
from typing import Any

from storage.certificate import is_current, newest_certificate
from storage.errors import FormatError, ShardCorruptError
from storage.label_set import LabelSet


def certificate_facts(label_sets: Iterable[LabelSet]) -> list[dict[str, Any]]:
    """The newest certificate of every label set, or that there is none, or that it is damaged."""
    return [{"label_set": found.key, **_facts(found)} for found in label_sets]


def _facts(label_set: LabelSet) -> dict[str, Any]:
    try:
        found = newest_certificate(label_set)
    except (FormatError, ShardCorruptError) as error:
        return {"verdict": "damaged", "reasons": [str(error)]}
    if found is None:
        return {"verdict": "none", "reasons": []}
    return {
        "verdict": found.verdict,
        "reasons": list(found.reasons),
        "number": found.number,
        "created_at": found.created_at,
        "current": is_current(label_set, found),
        "num_samples": found.num_samples,
        "agreement": None if found.agreement is None else found.agreement.model_dump(mode="json"),
        "drawing": None if found.drawing is None else found.drawing.model_dump(mode="json"),
        "coverage": None if found.coverage is None else found.coverage.model_dump(mode="json"),
        "provenance": found.provenance,
    }
