"""The label cache: what is committed is found, read exactly, never doubled and never changed."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from storage.errors import (
    BadLabelError,
    FormatError,
    LabelMismatchError,
    LabelStoreError,
    NotLabelledError,
    ShardCorruptError,
)
from storage.keys import sample_key
from storage.objects import Objects
from storage.samples import LabelledSample
from storage.store import LabelSet, LabelStore
from storage.testing import make_sample, make_spec

ROOT = Path(__file__).resolve().parents[3]
SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC) for number in range(8)]
KEYS = [sample.key for sample in SAMPLES]


def new_set(root: Path) -> LabelSet:
    return LabelStore(str(root), create=True).create(SPEC, {"tokenizer": "t"})


def reopened(root: Path) -> LabelSet:
    """The set as another process sees it."""
    return LabelStore(str(root)).open(SPEC.key)


def folder(root: Path) -> Path:
    return root / "label_sets" / SPEC.key


def committed_bytes(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def edit(path: Path, change: Callable[[dict], None]) -> None:
    """Change a JSON document by hand."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def assert_same(found: LabelledSample, expected: LabelledSample) -> None:
    """All fields are equal but the top-k log-probs, which are within 1/512 nat."""
    for name in LabelledSample.__dataclass_fields__:
        one, other = getattr(found, name), getattr(expected, name)
        if name == "topk_logprobs_NK":
            assert np.abs(one - other).max() <= 1 / 512
        elif isinstance(other, np.ndarray):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
        else:
            assert one == other


class RacedObjects(Objects):
    """A store where another writer commits just before our first commit record is created."""

    def __init__(self, root: Path, other_writer: Callable[[], object]) -> None:
        super().__init__(str(root))
        self._others: Iterator[Callable[[], object]] = iter([other_writer])

    def create(self, path: str, data: bytes) -> bool:
        if "/commits/" in path:
            for other_writer in self._others:
                other_writer()
        return super().create(path, data)


# -- writing and reading --------------------------------------------------------------------------
def test_samples_read_as_they_were_appended(tmp_path: Path) -> None:
    new_set(tmp_path).append(SAMPLES[:5], {})
    for found, expected in zip(reopened(tmp_path).read(KEYS[:5]), SAMPLES, strict=False):
        assert_same(found, expected)


def test_samples_are_read_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    labels = new_set(tmp_path)
    labels.append(SAMPLES[:4], {})
    labels.append(SAMPLES[4:], {})
    order = [KEYS[number] for number in (6, 1, 7, 0, 1)]
    assert [sample.key for sample in reopened(tmp_path).read(order)] == order


def test_a_partly_labelled_response_reads_back_whole(tmp_path: Path) -> None:
    """Score mode: the unlabelled tokens are in no label row and are kept beside them."""
    generation = SPEC.generation.model_copy(update={"mode": "score", "sampling": None})
    spec = SPEC.model_copy(update={"generation": generation})
    whole, labelled = SAMPLES[0], [1, 3]
    mask_R = np.isin(np.arange(5), labelled)
    sample = replace(
        whole,
        key=sample_key(whole.prompt_ids_P, 0, response_ids=whole.response_ids_R, label_mask=mask_R),
        finish_reason="given",
        **{
            name: getattr(whole, name)[labelled]
            for name in LabelledSample.__dataclass_fields__
            if name.endswith(("_N", "_NK"))
        },
    )
    labels = LabelStore(str(tmp_path)).create(spec, {})
    labels.append([sample], {})
    assert_same(next(labels.read([sample.key])), sample)


def test_a_stop_string_is_kept(tmp_path: Path) -> None:
    sample = replace(SAMPLES[0], finish_reason="stop", stop_reason="\n\n")
    labels = new_set(tmp_path)
    labels.append([sample], {})
    assert_same(next(labels.read([sample.key])), sample)


def test_samples_appended_twice_are_stored_once(tmp_path: Path) -> None:
    labels = new_set(tmp_path)
    assert labels.append(SAMPLES[:3], {}) is not None
    assert labels.append(SAMPLES[:3], {}) is None
    second = labels.append(SAMPLES[2:5], {})
    assert second is not None
    assert second.shards[0].num_samples == 2  # samples 3 and 4
    assert labels.totals().num_samples == 5


def test_a_sample_given_twice_in_one_call_is_stored_once(tmp_path: Path) -> None:
    record = new_set(tmp_path).append([SAMPLES[0], SAMPLES[0]], {})
    assert record is not None
    assert record.shards[0].num_samples == 1


def test_nothing_is_written_when_one_sample_is_bad(tmp_path: Path) -> None:
    labels = new_set(tmp_path)
    before = committed_bytes(tmp_path)
    with pytest.raises(BadLabelError, match="token_rank is below 1"):
        labels.append([SAMPLES[0], replace(SAMPLES[1], token_rank_N=np.zeros(5, np.int32))], {})
    assert committed_bytes(tmp_path) == before


def test_committed_bytes_never_change(tmp_path: Path) -> None:
    labels = new_set(tmp_path)
    labels.append(SAMPLES[:3], {})
    before = committed_bytes(tmp_path)
    labels.append(SAMPLES, {})
    LabelStore(str(tmp_path)).create(SPEC, {"tokenizer": "another"})
    after = committed_bytes(tmp_path)
    assert {path: after[path] for path in before} == before
    # one record and one shard of two files
    assert len(after) == len(before) + 3


def test_missing_samples_are_listed_in_their_order(tmp_path: Path) -> None:
    labels = new_set(tmp_path)
    labels.append([SAMPLES[1]], {})
    assert labels.missing([KEYS[2], KEYS[1], KEYS[0]]) == [KEYS[2], KEYS[0]]


def test_reading_a_sample_that_is_not_stored_says_how_many_are_missing(tmp_path: Path) -> None:
    labels = new_set(tmp_path)
    labels.append(SAMPLES[:1], {})
    with pytest.raises(NotLabelledError, match=rf"lacks 2 of 3 samples \(the first is {KEYS[1]}"):
        list(labels.read(KEYS[:3]))


def test_totals_count_every_sample_once(tmp_path: Path) -> None:
    labels = new_set(tmp_path)
    labels.append(SAMPLES[:3], {})
    labels.append(SAMPLES[3:], {})
    totals = reopened(tmp_path).totals()
    shards = list(folder(tmp_path).glob("shards/*"))
    # 8 samples of 5 tokens, all labelled
    assert (totals.num_commits, totals.num_shards, totals.num_samples) == (2, 2, 8)
    assert (totals.num_tokens, totals.num_rows) == (40, 40)
    assert totals.num_bytes == sum(path.stat().st_size for path in shards)


# -- several writers ------------------------------------------------------------------------------
def test_a_writer_sees_what_others_committed(tmp_path: Path) -> None:
    one, other = new_set(tmp_path), new_set(tmp_path)
    one.append(SAMPLES[:5], {})
    record = other.append(SAMPLES[3:], {})
    assert record is not None
    assert (record.number, record.shards[0].num_samples) == (2, 3)
    assert one.missing(KEYS) == []


def test_a_lost_race_for_a_commit_number_is_run_again(tmp_path: Path) -> None:
    """Both writers saw no commit; the other one takes number 1 with samples 0 to 4."""
    other = new_set(tmp_path)
    raced = RacedObjects(tmp_path, lambda: other.append(SAMPLES[:5], {"writer": "other"}))
    ours = LabelSet(raced, other.document)
    record = ours.append(SAMPLES[3:], {"writer": "ours"})
    assert record is not None
    assert (record.number, record.shards[0].num_samples) == (2, 3)
    labels = reopened(tmp_path)
    assert [r.provenance["writer"] for r in labels.refresh()] == ["other", "ours"]
    for found, expected in zip(labels.read(KEYS), SAMPLES, strict=True):
        assert_same(found, expected)
    # the shard of the lost race stays on disk, named by no record
    assert len(list(folder(tmp_path).glob("shards/*.labels.arrow"))) == 3
    assert list(labels.verify()) == []


def test_a_race_lost_to_the_same_samples_commits_nothing(tmp_path: Path) -> None:
    other = new_set(tmp_path)
    raced = RacedObjects(tmp_path, lambda: other.append(SAMPLES, {}))
    assert LabelSet(raced, other.document).append(SAMPLES[:2], {}) is None
    assert reopened(tmp_path).totals().num_commits == 1


def test_of_a_sample_in_two_commits_the_lower_number_wins(tmp_path: Path) -> None:
    """Two records can only share a sample when one is copied in by hand; reading still agrees."""
    first = new_set(tmp_path / "a")
    first.append([SAMPLES[0]], {})
    second = new_set(tmp_path / "b")
    second.append([replace(SAMPLES[0], finish_reason="stop")], {})
    for shard in folder(tmp_path / "b").glob("shards/*"):
        shard.rename(folder(tmp_path / "a") / "shards" / shard.name)
    record = folder(tmp_path / "b") / "commits" / "00000001.json"
    edit(record, lambda document: document.update(number=2))
    record.rename(folder(tmp_path / "a") / "commits" / "00000002.json")
    labels = reopened(tmp_path / "a")
    assert next(labels.read([KEYS[0]])).finish_reason == "length"
    assert labels.totals().num_samples == 1


WRITERS = """
import os, sys
from storage.shard import encode_shard
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

spec = make_spec()
samples = [make_sample(number, spec) for number in range(12)]
encode_shard(samples, spec)  # pyarrow imports pandas at its first use
waiting, start = os.pipe()
for first in (0, 2, 4, 6):
    if os.fork() == 0:
        os.close(start)
        os.read(waiting, 1)  # returns when the parent closes its end: all start together
        labels = LabelStore(sys.argv[1], create=True).create(spec, {})
        for number in range(first, first + 6, 2):
            labels.append(samples[number : number + 2], {"writer": str(first)})
        os._exit(0)
os.close(start)
sys.exit(max(os.wait()[1] for _ in range(4)))
"""


def test_concurrent_processes_store_every_sample_once(tmp_path: Path) -> None:
    """Four writers of samples 0-5, 2-7, 4-9 and 6-11 start together: 12 samples in all.

    They are forks of a process that has not touched a store yet, which saves three imports.
    """
    subprocess.run([sys.executable, "-c", WRITERS, str(tmp_path)], cwd=ROOT, check=True, timeout=50)
    labels = reopened(tmp_path)
    records = labels.refresh()
    expected = [make_sample(number, SPEC) for number in range(12)]
    assert [record.number for record in records] == list(range(1, len(records) + 1))
    assert sum(shard.num_samples for record in records for shard in record.shards) == 12
    for found, sample in zip(labels.read([s.key for s in expected]), expected, strict=True):
        assert_same(found, sample)
    assert list(labels.verify()) == []


KILLED_WRITER = """
import os, signal, sys
from storage.objects import Objects
from storage.store import LabelSet, LabelStore
from storage.testing import make_sample, make_spec

class DyingObjects(Objects):
    def create(self, path, data):
        if "/commits/" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().create(path, data)

spec = make_spec()
document = LabelStore(sys.argv[1]).open(spec.key).document
LabelSet(DyingObjects(sys.argv[1]), document).append([make_sample(1, spec)], {})
"""


def test_a_writer_killed_before_its_commit_leaves_nothing_visible(tmp_path: Path) -> None:
    labels = new_set(tmp_path)
    labels.append([SAMPLES[0]], {})
    died = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(tmp_path)], cwd=ROOT, check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert len(list(folder(tmp_path).glob("shards/*"))) == 4  # both shards are on disk
    assert labels.missing(KEYS[:2]) == [KEYS[1]]
    assert list(labels.verify()) == []
    labels.append(SAMPLES[:2], {})
    assert reopened(tmp_path).totals().num_samples == 2


# -- finding a set --------------------------------------------------------------------------------
def test_a_request_finds_its_label_set(tmp_path: Path) -> None:
    store = LabelStore(str(tmp_path))
    assert store.find(SPEC) is None
    created = store.create(SPEC, {"tokenizer": "t"})
    found = store.find(SPEC)
    assert found is not None
    assert found.document == created.document
    assert store.find(make_spec(seed=1)) is None


def test_the_first_provenance_of_a_set_stays(tmp_path: Path) -> None:
    store = LabelStore(str(tmp_path))
    store.create(SPEC, {"dataset": "first"})
    assert store.create(SPEC, {"dataset": "second"}).document.provenance == {"dataset": "first"}


def test_a_set_opens_by_the_beginning_of_its_key(tmp_path: Path) -> None:
    new_set(tmp_path)
    assert LabelStore(str(tmp_path)).open(SPEC.key[:6]).key == SPEC.key


def test_an_unknown_key_lists_the_known_ones(tmp_path: Path) -> None:
    new_set(tmp_path)
    with pytest.raises(
        LabelStoreError, match=rf"no label set of .*'ffff'; label sets here: {SPEC.key}"
    ):
        LabelStore(str(tmp_path)).open("ffff")


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(LabelStoreError, match="label sets here: none"):
        LabelStore(str(tmp_path / "nowhere")).open("ffff")


def test_a_beginning_that_fits_several_sets_lists_them(tmp_path: Path) -> None:
    store = LabelStore(str(tmp_path))
    keys = sorted(store.create(make_spec(seed=seed), {}).key for seed in range(2))
    with pytest.raises(LabelStoreError, match=rf"several label sets .*: {keys[0]}, {keys[1]}"):
        store.open("")


# -- tampering and damage -------------------------------------------------------------------------
def test_a_spec_edited_by_hand_is_refused(tmp_path: Path) -> None:
    new_set(tmp_path)
    edit(folder(tmp_path) / "spec.json", lambda document: document["spec"].update(vocab_size=99))
    with pytest.raises(FormatError, match="the spec was edited or the folder renamed"):
        reopened(tmp_path)
    with pytest.raises(LabelMismatchError, match="was made for another request"):
        LabelStore(str(tmp_path)).find(SPEC)


def test_a_renamed_folder_is_refused(tmp_path: Path) -> None:
    new_set(tmp_path)
    folder(tmp_path).rename(folder(tmp_path).with_name("f" * 32))
    with pytest.raises(FormatError, match="the spec was edited or the folder renamed"):
        LabelStore(str(tmp_path)).open("ffff")


def test_a_folder_without_a_spec_is_refused(tmp_path: Path) -> None:
    new_set(tmp_path).append(SAMPLES[:1], {})
    (folder(tmp_path) / "spec.json").unlink()
    with pytest.raises(FormatError, match=r"spec\.json is missing"):
        reopened(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 1, "format: Input should be 0"),
        ("extra", 1, "extra: Extra inputs are not permitted"),
        ("key", None, "key: Input should be a valid string"),
    ],
)
def test_a_spec_of_another_form_names_the_field(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    new_set(tmp_path)
    edit(folder(tmp_path) / "spec.json", lambda document: document.update({field: value}))
    with pytest.raises(FormatError, match=f"is not a LabelSetDocument of format 0: {message}"):
        reopened(tmp_path)


@pytest.mark.parametrize(
    "name", ["../../../secret", "/etc/passwd", "a/b.arrow", "..", "", "A.arrow"]
)
def test_a_record_that_names_a_path_outside_its_set_is_refused(tmp_path: Path, name: str) -> None:
    new_set(tmp_path).append(SAMPLES[:1], {})
    record = folder(tmp_path) / "commits" / "00000001.json"
    edit(record, lambda document: document["shards"][0]["labels"].update(name=name))
    with pytest.raises(FormatError, match=r"shards\.0\.labels\.name: .*is not a plain file name"):
        reopened(tmp_path).refresh()


def test_a_missing_commit_record_is_refused(tmp_path: Path) -> None:
    labels = new_set(tmp_path)
    for sample in SAMPLES[:3]:
        labels.append([sample], {})
    (folder(tmp_path) / "commits" / "00000002.json").unlink()
    with pytest.raises(FormatError, match=r"00000002\.json is missing although .*00000003\.json"):
        reopened(tmp_path).refresh()
    with pytest.raises(FormatError, match=r"00000002\.json is missing"):
        list(reopened(tmp_path).verify())


def test_a_renamed_commit_record_is_refused(tmp_path: Path) -> None:
    new_set(tmp_path).append(SAMPLES[:1], {})
    record = folder(tmp_path) / "commits" / "00000001.json"
    record.with_name("00000002.json").write_bytes(record.read_bytes())
    with pytest.raises(FormatError, match=r"wanted commit 2 of label set .*, found number 1"):
        reopened(tmp_path).refresh()


def test_a_commit_record_of_another_set_is_refused(tmp_path: Path) -> None:
    new_set(tmp_path).append(SAMPLES[:1], {})
    record = folder(tmp_path) / "commits" / "00000001.json"
    edit(record, lambda document: document.update(label_set="f" * 32))
    with pytest.raises(FormatError, match="belongs to label set ffff"):
        reopened(tmp_path).refresh()


@pytest.mark.parametrize("table", ["labels", "samples"])
def test_a_missing_shard_file_is_refused_and_found_by_verify(tmp_path: Path, table: str) -> None:
    labels = new_set(tmp_path)
    labels.append(SAMPLES[:3], {})
    next(folder(tmp_path).glob(f"shards/*.{table}.arrow")).unlink()
    with pytest.raises(ShardCorruptError, match=rf"\.{table}\.arrow was committed and is missing"):
        list(reopened(tmp_path).read(KEYS[:3]))
    problems = list(reopened(tmp_path).verify())
    assert [problem.lost_samples for problem in problems] == [3]
    assert problems[0].path.endswith(f".{table}.arrow")


@pytest.mark.parametrize("table", ["labels", "samples"])
def test_a_flipped_bit_in_any_byte_is_refused(tmp_path: Path, table: str) -> None:
    """The whole-file checksum notices also what the columns' checksums do not cover."""
    new_set(tmp_path).append(SAMPLES[:3], {})
    path = next(folder(tmp_path).glob(f"shards/*.{table}.arrow"))
    whole = path.read_bytes()
    for position in range(0, len(whole), len(whole) // 100):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(ShardCorruptError, match=r"has the checksum .*; run `distill verify`"):
            list(reopened(tmp_path).read(KEYS[:3]))


def test_a_truncated_shard_file_is_refused(tmp_path: Path) -> None:
    new_set(tmp_path).append(SAMPLES[:3], {})
    path = next(folder(tmp_path).glob("shards/*.labels.arrow"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardCorruptError, match="truncated or replaced"):
        list(reopened(tmp_path).read(KEYS[:3]))


def test_damage_in_one_shard_leaves_the_others_readable(tmp_path: Path) -> None:
    labels = new_set(tmp_path)
    first = labels.append(SAMPLES[:3], {})
    labels.append(SAMPLES[3:], {})
    assert first is not None
    name = first.shards[0].labels.name
    (folder(tmp_path) / "shards" / name).write_bytes(b"")
    assert [sample.key for sample in reopened(tmp_path).read(KEYS[3:])] == KEYS[3:]
    assert [problem.path.endswith(name) for problem in reopened(tmp_path).verify()] == [True]


@pytest.mark.parametrize(
    ("field", "table", "message"),
    [
        ("num_samples", "samples", "holds 3 samples, its commit record says 4"),
        ("num_rows", "labels", "holds 15 rows, its commit record says 16"),
    ],
)
def test_a_record_with_other_counts_is_refused(
    tmp_path: Path, field: str, table: str, message: str
) -> None:
    new_set(tmp_path).append(SAMPLES[:3], {})  # 3 samples of 5 rows
    record = folder(tmp_path) / "commits" / "00000001.json"

    def one_more(document: dict) -> None:
        document["shards"][0][field] += 1

    edit(record, one_more)
    with pytest.raises(ShardCorruptError, match=rf"\.{table}\.arrow {message}"):
        list(reopened(tmp_path).read(KEYS[:3]))


def test_a_store_that_cannot_be_written_keeps_what_was_committed(tmp_path: Path) -> None:
    labels = new_set(tmp_path)
    labels.append(SAMPLES[:3], {})
    shards = folder(tmp_path) / "shards"
    shards.rename(shards.with_name("elsewhere"))
    shards.write_text("a file stands where a directory should")
    with pytest.raises(LabelStoreError, match="committed before is intact"):
        labels.append(SAMPLES[3:], {})
    shards.unlink()
    shards.with_name("elsewhere").rename(shards)
    assert reopened(tmp_path).totals().num_samples == 3
