"""Take damaged files out of service, so that the next labelling asks exactly for what is lost.

Nothing is overwritten. A damaged shard is removed from service by a new record, a damaged index
is replaced by one made from its shards, a damaged record by an empty one, and a damaged merged
record, which is derived, is deleted; so are damaged numbers of sidecars, certificates, and reasons
why samples are in quarantine: the next labelling certifies, or asks for the sample, again. Labels
that are undamaged stay as they are.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from storage.certificate import give_up_certificate
from storage.errors import LabelStoreError
from storage.keys import LabelSetSpec
from storage.label_set import LabelSet
from storage.objects import Objects
from storage.provenance import utc_now
from storage.quarantine import Quarantine
from storage.records import CommitRecord, LabelSetDocument, Name, to_json
from storage.sidecar import read_spec
from storage.verify import Problem, check_shard
from storage.writer import NewShard, publish


@dataclass(slots=True)
class Repaired:
    """What was done to one label set."""

    quarantined: list[Name] = field(default_factory=list)
    """Shards that are not served any more."""
    reindexed: list[Name] = field(default_factory=list)
    """Shards that a new index finds."""
    replaced_records: list[int] = field(default_factory=list)
    """Damaged records that an empty one replaces."""
    deleted: list[str] = field(default_factory=list)
    """Damaged merged records, specs and parts of sidecars, certificates, files of quarantine."""
    lost_samples: int = 0
    """Samples that will be asked for again, as far as they are known."""


def repair(
    label_set: LabelSet, problems: Sequence[Problem], provenance: dict[str, str]
) -> Repaired:
    """Repair what :func:`storage.verify.verify` found.

    Raises:
        LabelStoreError: if the store cannot be written.
    """
    done = Repaired()
    for problem in problems:
        if problem.what == "merged":
            label_set.objects.delete(problem.path)
            done.deleted.append(problem.path)
        elif problem.what == "sidecar":
            _repair_sidecar(label_set, problem)
            done.deleted.append(problem.path)
        elif problem.what == "certificate":
            give_up_certificate(label_set, problem.path)
            done.deleted.append(problem.path)
        elif problem.what == "quarantine":
            Quarantine(label_set).give_up(problem.path)
            done.deleted.append(problem.path)
        elif problem.what == "record":
            _replace_record(label_set, problem.number, provenance)
            done.replaced_records.append(problem.number)
    repaired = LabelSet(label_set.objects, label_set.document)
    damaged = {problem.name for problem in problems if problem.what == "shard"}
    unindexed = {problem.name for problem in problems if problem.what == "index"} - damaged
    while damaged or unindexed:
        live = {shard.name: shard for shard in repaired.live_shards()}
        lost = [shard for name, shard in live.items() if name in damaged]
        kept = [shard for name, shard in live.items() if name in unindexed]
        shards = [NewShard(shard, check_shard(repaired, shard)) for shard in kept]
        removed = [shard.name for shard in (*lost, *kept)]
        facts = {**provenance, "quarantined": " ".join(shard.name for shard in lost)}
        if not removed or publish(repaired, shards, removed=removed, provenance=facts) is not None:
            done.quarantined = [shard.name for shard in lost]
            done.reindexed = [shard.name for shard in kept]
            done.lost_samples = sum(shard.num_samples for shard in lost)
            break
    return done


def _repair_sidecar(label_set: LabelSet, problem: Problem) -> None:
    """Give up what is damaged: the next append writes the spec, the producer the numbers."""
    if problem.number == 0:
        label_set.objects.delete(problem.path)
    else:
        label_set.sidecar(read_spec(label_set, problem.name)).give_up(problem.number)


def _replace_record(label_set: LabelSet, number: int, provenance: dict[str, str]) -> None:
    empty = CommitRecord(
        label_set=label_set.key,
        first=number,
        last=number,
        created_at=utc_now(),
        provenance={**provenance, "replaces": "a damaged record"},
    )
    if not label_set.log.create(empty):  # it is damaged, not absent
        label_set.objects.delete(label_set.log.path(number, number))  # damaged in its turn
        label_set.log.create(empty, merged=True)


def restore_spec(objects: Objects, key: str, provenance: dict[str, str]) -> LabelSetDocument:
    """Write a damaged ``spec.json`` anew: every shard holds a copy of the spec.

    Raises:
        LabelStoreError: if no shard of the set has it.
    """
    prefix = f"label_sets/{key}"
    for path in objects.paths(f"{prefix}/shards"):
        spec = _spec_in(objects, path)
        if spec is not None and spec.key == key:
            facts = {**provenance, "restored_from": path}
            document = LabelSetDocument(key=key, spec=spec, provenance=facts)
            objects.delete(f"{prefix}/spec.json")
            objects.create(f"{prefix}/spec.json", to_json(document))
            return document
    raise LabelStoreError(
        f"the spec of label set {key} is damaged and no shard has a copy of it; "
        f"remove {objects.uri}/{prefix} and label again"
    )


def _spec_in(objects: Objects, path: str) -> LabelSetSpec | None:
    try:
        with pa.ipc.open_file(io.BytesIO(objects.get(path))) as reader:
            return LabelSetSpec.model_validate_json(reader.schema.metadata[b"distillcache.spec"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None
