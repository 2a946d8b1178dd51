"""What an archive of a label set holds: its list of contents and its data card."""

from pathlib import Path
from typing import ClassVar, Literal

import jinja2

from storage.errors import LabelStoreError, ShardCorruptError
from storage.label_set import LabelSet
from storage.records import Document, LabelSetDocument, ShardRecord
from storage.schema import FORMAT_VERSION

MANIFEST = "manifest.json"
CARD = "README.md"
TABLES = ("labels", "samples")


class PackManifest(Document):
    """The first member of an archive; every other one is named by it."""

    damage: ClassVar[type[LabelStoreError]] = ShardCorruptError

    format: Literal[1] = FORMAT_VERSION
    document: LabelSetDocument
    shards: tuple[ShardRecord, ...]
    licence: str | None
    """Licence of the labels, as stated by whoever packed them."""
    provenance: dict[str, str]

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.num_samples for shard in self.shards)


def member_name(shard: ShardRecord, table: str) -> str:
    """Name of a shard's file in an archive."""
    return f"shards/{shard.name}.{table}.arrow"


def data_card(label_set: LabelSet, manifest: PackManifest) -> str:
    """The data card of an archive, in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        autoescape=False,  # noqa: S701 - Markdown, of our own values
    )
    return environment.get_template("card.md.jinja").render(
        key=label_set.key,
        generation_key=label_set.spec.generation.key,
        spec=label_set.spec.model_dump(mode="json"),
        facts=label_set.document.provenance,
        totals=label_set.totals(),
        shards=manifest.shards,
        licence=manifest.licence,
        provenance=manifest.provenance,
    )
