"""After a repair exactly the samples of damaged shards are missing, and all others are served."""

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.certificate import Certificate, is_fit, newest_certificate, publish_certificate
from storage.compact import compact
from storage.errors import EditedSpecError, FormatError, LabelStoreError
from storage.quarantine import Quarantine, QuarantinedSample
from storage.records import parse, to_json
from storage.repair import Repaired, repair, restore_spec
from storage.testing import make_certificate, make_sample, make_spec

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC) for number in range(9)]
FIRST, SECOND, THIRD = SAMPLES[:3], SAMPLES[3:6], SAMPLES[6:]


@pytest.fixture
def store(bench, monkeypatch: pytest.MonkeyPatch):
    """Three commits of three samples; the first two are also summed up in a merged record."""
    monkeypatch.setattr("storage.log.MERGE_FACTOR", 2)
    bench.filled(FIRST, SECOND, THIRD)
    return bench


def repaired(bench) -> Repaired:
    label_set = bench.fresh()
    return repair(label_set, list(label_set.verify()), {"host": "h"})


def file_of(bench, number: int, table: str) -> Path:
    """A file that a commit made."""
    label_set = bench.fresh()
    record = label_set.log.single(number)
    if table == "index":
        return bench.root / label_set.index_path(record.index.name)
    return bench.root / label_set.shard_path(record.shards[0].name, table)


def test_an_undamaged_set_is_left_alone(store) -> None:
    before = store.contents()
    assert repaired(store) == Repaired()
    assert store.contents() == before


@pytest.mark.parametrize("table", ["labels", "samples"])
@pytest.mark.parametrize("missing", [False, True])
def test_of_a_damaged_shard_exactly_its_samples_are_asked_for_again(
    store, table: str, missing: bool
) -> None:
    path = file_of(store, 2, table)
    path.unlink() if missing else store.damage(path)
    before = store.contents()
    done = repaired(store)
    assert (len(done.quarantined), done.lost_samples) == (1, 3)
    assert not done.reindexed
    store.assert_serves([*FIRST, *THIRD], SAMPLES)
    after = store.contents()
    assert {path: after[path] for path in before} == before  # nothing was overwritten
    store.create().append(SAMPLES, {})
    store.assert_serves(SAMPLES)


def test_the_record_names_what_was_quarantined(store) -> None:
    name = file_of(store, 2, "labels").name.partition(".")[0]
    store.damage(file_of(store, 2, "labels"))
    repaired(store)
    last = list(store.fresh().log.singles())[-1]
    assert last.removed == (name,)
    assert last.provenance == {"host": "h", "quarantined": name}


@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_index_is_made_anew(store, missing: bool) -> None:
    path = file_of(store, 3, "index")
    path.unlink() if missing else store.damage(path)
    done = repaired(store)
    assert (len(done.reindexed), done.quarantined, done.lost_samples) == (1, [], 0)
    store.assert_serves(SAMPLES)


def test_a_damaged_merged_index_is_made_anew(store) -> None:
    label_set = store.fresh()
    merged = label_set.log.merged(1, 2)
    (store.root / label_set.index_path(merged.indexes[0].name)).unlink()
    assert len(repaired(store).reindexed) == 2
    store.assert_serves(SAMPLES)


def test_a_shard_whose_index_is_damaged_too_is_lost(store) -> None:
    store.damage(file_of(store, 3, "index"))
    store.damage(file_of(store, 3, "labels"))
    done = repaired(store)
    assert (len(done.quarantined), done.reindexed) == (1, [])
    store.assert_serves([*FIRST, *SECOND], SAMPLES)


@pytest.mark.parametrize("how", ["missing", "empty", "edited"])
def test_a_damaged_record_costs_its_samples(bench, how: str) -> None:
    bench.filled(FIRST, SECOND, THIRD)
    path = bench.folder() / "commits" / "00000002.json"
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        bench.edit(path, lambda document: document.update(created_at="later"), sign=False)
    assert repaired(bench).replaced_records == [2]
    bench.assert_serves([*FIRST, *THIRD], SAMPLES)
    bench.create().append(SAMPLES, {})
    bench.assert_serves(SAMPLES)
    compact(bench.fresh(), {})
    bench.assert_serves(SAMPLES)


def test_a_damaged_record_that_was_merged_costs_nothing(store) -> None:
    (store.folder() / "commits" / "00000002.json").write_bytes(b"")
    assert repaired(store).replaced_records == [2]
    store.assert_serves(SAMPLES)


def test_a_damaged_replacement_is_replaced(bench) -> None:
    bench.filled(FIRST, SECOND, THIRD)
    (bench.folder() / "commits" / "00000002.json").write_bytes(b"")
    repaired(bench)
    (replacement,) = bench.files("merged/*")
    replacement.write_bytes(b"")
    repaired(bench)
    bench.assert_serves([*FIRST, *THIRD], SAMPLES)


def test_a_damaged_merged_record_is_deleted_and_costs_nothing(store) -> None:
    (path,) = store.files("merged/*")
    path.write_bytes(b"{}")
    assert store.fresh().contains([SAMPLES[0].key]).all()  # from the records themselves
    done = repaired(store)
    assert [Path(deleted).name for deleted in done.deleted] == [path.name]
    assert not path.exists()
    store.assert_serves(SAMPLES)


def test_a_damaged_merged_record_is_no_matter_after_a_collection(store, gc) -> None:
    """The indexes of the single records are gone, so their shards get new ones."""
    assert len(gc(store)) == 2
    store.files("merged/*")[0].write_bytes(b"{}")
    done = repaired(store)
    assert (len(done.deleted), len(done.reindexed), done.lost_samples) == (1, 2, 0)
    store.assert_serves(SAMPLES)


def test_everything_at_once(store) -> None:
    """The first shard, the third index, the second record and the merged record are damaged.

    Nothing but the second record named the second shard, so its samples are lost as well.
    """
    store.damage(file_of(store, 1, "labels"))
    store.damage(file_of(store, 3, "index"))
    (store.folder() / "commits" / "00000002.json").write_bytes(b"")
    store.files("merged/*")[0].write_bytes(b"")
    repaired(store)
    store.assert_serves(THIRD, SAMPLES)
    assert repaired(store) == Repaired()


def test_a_commit_that_comes_between_is_kept(store) -> None:
    store.damage(file_of(store, 3, "labels"))
    other = store.fresh()
    more = make_sample(20, SPEC)
    ours = store.raced(lambda: other.append([more], {}))
    repair(ours, list(ours.verify()), {})
    store.assert_serves([*FIRST, *SECOND, more], SAMPLES)


def test_a_shard_that_was_compacted_meanwhile_is_left_alone(store) -> None:
    """The problem was real when it was found; now nothing serves that shard."""
    label_set = store.fresh()
    path = file_of(store, 3, "labels")
    whole = path.read_bytes()
    store.damage(path)
    problems = list(label_set.verify())
    path.write_bytes(whole)
    compact(store.fresh(), {})
    assert repair(label_set, problems, {}).quarantined == []
    store.assert_serves(SAMPLES)


# -- specs -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_a_damaged_spec_is_restored_from_a_shard(bench, content: bytes | None) -> None:
    label_set = bench.filled(FIRST, SECOND)
    path = bench.folder() / "spec.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
        with pytest.raises(LabelStoreError):
            bench.fresh()
    document = restore_spec(label_set.objects, SPEC.key, {"host": "h"})
    assert document.spec == SPEC
    assert document.provenance["host"] == "h"
    bench.assert_serves([*FIRST, *SECOND])


def test_an_edited_spec_is_restored_from_an_undamaged_shard(bench) -> None:
    label_set = bench.filled(FIRST, SECOND)
    first, _ = bench.files("shards/*.labels.arrow")
    first.write_bytes(b"")
    bench.edit(bench.folder() / "spec.json", lambda document: document["spec"].update(tail="topk"))
    with pytest.raises(EditedSpecError):
        bench.fresh()
    restore_spec(label_set.objects, SPEC.key, {})
    assert bench.fresh().spec == SPEC


def test_a_spec_without_any_shard_cannot_be_restored(bench) -> None:
    label_set = bench.create()
    (bench.folder() / "spec.json").write_bytes(b"")
    with pytest.raises(LabelStoreError, match="no shard has a copy of it"):
        restore_spec(label_set.objects, SPEC.key, {})


# -- certificates and samples in quarantine --------------------------------------------------------
@pytest.fixture
def beside(bench):
    """A set with two certificates, the second of which says unfit, and two samples set aside."""
    label_set = bench.filled(SAMPLES[:7])
    publish_certificate(label_set, lambda n: make_certificate(label_set, n))
    publish_certificate(label_set, lambda n: make_certificate(label_set, n, "entropy differs"))
    for sample in SAMPLES[7:]:
        Quarantine(label_set).add(sample.key, "engine died", "three times", {})
    return bench


FILES = {
    "certificate": "certificates/00000002.json",
    "older certificate": "certificates/00000001.json",
    "quarantine": f"quarantine/{SAMPLES[8].key}.json",
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_json(path: Path) -> None:
    path.write_bytes(b"not JSON")


def another_schema(path: Path) -> None:
    path.write_text('{"format": 1}')


def of_another_set(path: Path) -> None:
    """A whole document that says another label set; its own checksum fits."""
    kind = Certificate if path.parent.name == "certificates" else QuarantinedSample
    document = parse(kind, path.read_bytes(), name="")
    path.write_bytes(to_json(document.model_copy(update={"label_set": "0" * 32})))


@pytest.mark.parametrize("damage", [flip, cut, empty, no_json, another_schema, of_another_set])
@pytest.mark.parametrize("what", list(FILES))
def test_damage_beside_the_labels_is_found_and_given_up(
    beside, what: str, damage: Callable[[Path], None]
) -> None:
    path = beside.folder() / FILES[what]
    damage(path)
    label_set = beside.fresh()
    (problem,) = label_set.verify()
    assert (problem.what, problem.lost_samples) == (what.split()[-1], 0)
    assert problem.path == f"{label_set.prefix}/{FILES[what]}"
    assert path.name in problem.error
    assert repaired(beside).deleted == [problem.path]
    assert list(beside.fresh().verify()) == []
    beside.assert_serves(SAMPLES[:7])


def test_an_older_certificate_does_not_count_again(beside) -> None:
    flip(beside.folder() / FILES["certificate"])
    repaired(beside)
    assert newest_certificate(beside.fresh()) is None
    assert (
        publish_certificate(beside.fresh(), lambda n: make_certificate(beside.fresh(), n)).number
        == 1
    )


def test_a_damaged_older_certificate_changes_no_verdict(beside) -> None:
    flip(beside.folder() / FILES["older certificate"])
    repaired(beside)
    assert not is_fit(beside.fresh())


def test_of_a_damaged_reason_only_its_sample_is_asked_for_again(beside) -> None:
    flip(beside.folder() / FILES["quarantine"])
    assert Quarantine(beside.fresh()).keys() == {SAMPLES[7].key, SAMPLES[8].key}
    repaired(beside)
    assert Quarantine(beside.fresh()).keys() == {SAMPLES[7].key}


@pytest.mark.parametrize("name", ["certificates/newest.json", "quarantine/notes.txt"])
def test_a_file_with_a_name_that_none_has_is_found(beside, name: str) -> None:
    folder = beside.folder()
    source = FILES["certificate" if name.startswith("c") else "quarantine"]
    (folder / source).rename(folder / name)
    (problem,) = beside.fresh().verify()
    assert "it was renamed" in problem.error
    if problem.what == "certificate":  # its true number is unknown: labels are not called fit
        with pytest.raises(FormatError, match="it was renamed"):
            is_fit(beside.fresh())
    repaired(beside)
    assert list(beside.fresh().verify()) == []
    assert Quarantine(beside.fresh()).keys() <= {sample.key for sample in SAMPLES[7:]}
