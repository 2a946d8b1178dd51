"""Label kinds: how soft labels become Arrow columns. To add one, write ``<name>.py`` here and add
one line to ``LABEL_KINDS``.

Its options are a spec class in ``storage/keys.py`` (one more member of the union of
``LabelSetSpec.kind``), its columns a section of ``docs/format.md``, its tests
``tests/unit/storage/test_<name>.py``.
"""

from storage.labels.base import LabelKind
from storage.labels.topk import TopK

LABEL_KINDS: dict[str, type[LabelKind]] = {
    "topk": TopK,
}
