"""The content-addressed label cache: label sets by the key of the request that they answer."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from storage.errors import (
    EditedSpecError,
    FormatError,
    LabelStoreError,
    ShardCorruptError,
)
from storage.keys import LabelSetSpec
from storage.label_set import LabelSet
from storage.objects import Objects
from storage.partitions import partition_bits
from storage.records import LabelSetDocument, parse, to_json
from storage.selection import Selection, load_selection
from storage.view import LabelView, Plan

PARALLEL_READS = 16
"""Small objects that are fetched at the same time."""


class LabelStore:
    """The label sets below one URI.

    Args:
        uri: Local path, ``s3://``, ``gs://`` or ``az://``.
        create: Make a missing local directory.
    """

    def __init__(self, uri: str, *, create: bool = False) -> None:
        self.objects = Objects(uri, create=create)
        self.uri = uri

    def keys(self) -> list[str]:
        """Keys of all label sets, sorted; those that were removed are left out."""
        names = self.objects.directories("label_sets")
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            specs = pool.map(self._spec_bytes, names)
            return [name for name, data in zip(names, specs, strict=True) if data is not None]

    def open(self, key: str) -> LabelSet:
        """Open a label set by its key or by a unique beginning of it.

        Raises:
            LabelStoreError: if no set or several sets match.
            EditedSpecError: if the stored spec does not have this key (edited or renamed).
            FormatError: if it is no spec at all.
        """
        known = self.keys()
        matches = [found for found in known if found.startswith(key)]
        if len(matches) != 1:
            what = "several label sets" if matches else "no label set"
            raise LabelStoreError(
                f"{what} of store {self.uri!r} match {key!r}; "
                f"label sets here: {', '.join(matches or known) or 'none'}"
            )
        document = self._document(matches[0])
        if document is None:
            raise FormatError(f"{self.uri}/{_spec_path(matches[0])} is missing")
        return LabelSet(self.objects, document)

    def find(self, spec: LabelSetSpec) -> LabelSet | None:
        """The label set that was made for exactly this request, ``None`` if there is none yet.

        Raises:
            EditedSpecError: if the stored spec is another one than the request.
        """
        document = self._document(spec.key)
        return None if document is None else LabelSet(self.objects, document)

    def create(
        self, spec: LabelSetSpec, provenance: dict[str, str], *, expected_tokens: int = 0
    ) -> LabelSet:
        """The label set of a request, created if it does not exist.

        Args:
            spec: The request.
            provenance: Names and digests of the first request; information only.
            expected_tokens: Response tokens of the first request; decides the partitions.
        """
        document = LabelSetDocument(
            key=spec.key,
            spec=spec,
            partition_bits=partition_bits(expected_tokens),
            provenance=provenance,
        )
        self.objects.create(_spec_path(spec.key), to_json(document))
        found = self.find(spec)
        if found is None:
            raise LabelStoreError(f"label set {spec.key} of {self.uri!r} vanished after creation")
        return found

    def view(self, spec: LabelSetSpec) -> LabelView:
        """Everything stored that answers a request, whichever set it lies in."""
        own = self.find(spec)
        others = [key for key in self.objects.directories("label_sets") if key != spec.key]
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            documents = list(pool.map(self._readable_document, others))
        related = [
            LabelSet(self.objects, document)
            for document in documents
            if document is not None and document.spec.generation == spec.generation
        ]
        related = [found for found in related if _is_readable(found)]
        return LabelView(spec, [own, *related] if own is not None else related)

    def plan(self, spec: LabelSetSpec, keys: Sequence[str]) -> Plan:
        """Which of these samples are stored for a request; opens no shard."""
        return self.view(spec).plan(keys)

    def selections(self) -> list[str]:
        """Keys of all selections, sorted."""
        paths = self.objects.paths("selections")
        return [path.rpartition("/")[2].removesuffix(".arrow") for path in paths]

    def selection(self, key: str) -> Selection:
        """A selection by its key; see :func:`storage.selection.load_selection`."""
        return load_selection(self.objects, key)

    def damaged_selections(self) -> dict[str, str]:
        """Path and error of every selection that cannot be read.

        Raises:
            StoreAccessError: if the store cannot be read.
        """
        found = {}
        for path in self.objects.paths("selections"):
            try:
                self.selection(path.rpartition("/")[2].removesuffix(".arrow"))
            except (FormatError, ShardCorruptError) as error:
                found[path] = str(error)
        return found

    def _spec_bytes(self, key: str) -> bytes | None:
        try:
            return self.objects.get(_spec_path(key))
        except FileNotFoundError:
            return None

    def _readable_document(self, key: str) -> LabelSetDocument | None:
        """As ``_document``; a damaged set of somebody else's is no reason to stop."""
        try:
            return self._document(key)
        except FormatError:
            return None

    def _document(self, key: str) -> LabelSetDocument | None:
        """The checked spec of a set.

        Raises:
            EditedSpecError: if its content does not have the key of its folder.
            FormatError: if it cannot be read at all.
        """
        data = self._spec_bytes(key)
        if data is None:
            return None
        name = f"{self.uri}/{_spec_path(key)}"
        document = parse(LabelSetDocument, data, name=name)
        if document.key != key or document.spec.key != key:
            raise EditedSpecError(
                f"{name}: its content has the key {document.spec.key}; the spec was edited or the "
                "folder renamed"
            )
        return document


def _is_readable(label_set: LabelSet) -> bool:
    """Whether the history is in order; a damaged set of somebody else's is no reason to stop."""
    try:
        label_set.refresh()
    except (FormatError, ShardCorruptError):
        return False
    return True


def _spec_path(key: str) -> str:
    return f"label_sets/{key}/spec.json"
