"""Label kinds: how soft labels become Arrow columns.

To add one, write ``<name>.py`` here and add one line to ``LABEL_KINDS``.

Its options are a spec class in ``storage/keys.py`` (one more member of the union ``KindSpec``),
its columns a section of ``docs/format.md``, its tests ``tests/unit/storage/test_<name>.py``.
"""

from typing import Any

from storage.keys import MassSpec, TopKSpec
from storage.labels.base import LabelKind
from storage.labels.mass import Mass
from storage.labels.topk import TopK

LABEL_KINDS: dict[str, type[LabelKind[Any]]] = {
    "topk": TopK,
    "mass": Mass,
}


def label_kind(spec: TopKSpec | MassSpec) -> LabelKind[Any]:
    """The kind of labels that ``spec`` asks for."""
    return LABEL_KINDS[spec.type](spec)
