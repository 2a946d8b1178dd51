"""Label sets are found by the request that they answer, and by nothing else."""

from pathlib import Path

import pytest

from storage.errors import EditedSpecError, FormatError, LabelStoreError
from storage.garbage import drop
from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC) for number in range(4)]


def test_a_request_finds_its_label_set(bench) -> None:
    assert bench.store.find(SPEC) is None
    created = bench.store.create(SPEC, {"tokenizer": "t"})
    found = bench.store.find(SPEC)
    assert found is not None
    assert found.document == created.document
    assert bench.store.find(make_spec(seed=1)) is None


def test_the_first_provenance_of_a_set_stays(bench) -> None:
    bench.store.create(SPEC, {"dataset": "first"})
    again = bench.store.create(SPEC, {"dataset": "second"}, expected_tokens=2**30)
    assert again.document.provenance == {"dataset": "first"}
    assert again.totals().num_partitions == 1


def test_a_large_first_request_makes_partitions(bench) -> None:
    # 2**24 tokens at about 2**20 per partition
    assert bench.create(expected_tokens=2**24).totals().num_partitions == 16


def test_a_set_opens_by_the_beginning_of_its_key(bench) -> None:
    bench.create()
    assert bench.store.open(SPEC.key[:6]).key == SPEC.key


def test_keys_are_those_of_all_sets_sorted(bench) -> None:
    keys = [bench.create(make_spec(seed=seed)).key for seed in range(5)]
    assert bench.store.keys() == sorted(keys)


def test_an_unknown_key_lists_the_known_ones(bench) -> None:
    bench.create()
    with pytest.raises(
        LabelStoreError, match=rf"no label set of .*'ffff'; label sets here: {SPEC.key}"
    ):
        bench.store.open("ffff")


def test_a_store_that_does_not_exist_is_empty_and_stays_so(tmp_path: Path) -> None:
    store = LabelStore(str(tmp_path / "nowhere"))
    assert store.keys() == []
    assert store.find(SPEC) is None
    assert store.plan(SPEC, [SAMPLES[0].key]).misses.tolist() == [True]
    with pytest.raises(LabelStoreError, match="label sets here: none"):
        store.open("ffff")
    assert not (tmp_path / "nowhere").exists()


def test_a_beginning_that_fits_several_sets_lists_them(bench) -> None:
    keys = sorted(bench.create(make_spec(seed=seed)).key for seed in range(2))
    with pytest.raises(LabelStoreError, match=rf"several label sets .*: {keys[0]}, {keys[1]}"):
        bench.store.open("")


# -- specs that were tampered with -----------------------------------------------------------------
@pytest.mark.parametrize("sign", [False, True])
def test_a_spec_edited_by_hand_is_refused(bench, sign: bool) -> None:
    bench.create()
    spec = bench.folder() / "spec.json"
    bench.edit(spec, lambda document: document["spec"].update(vocab_size=99), sign=sign)
    with pytest.raises(EditedSpecError, match=r"spec\.json"):
        bench.fresh()
    with pytest.raises(EditedSpecError, match=r"spec\.json"):
        bench.store.find(SPEC)


def test_a_renamed_folder_is_refused(bench) -> None:
    bench.create()
    bench.folder().rename(bench.folder().with_name("f" * 32))
    with pytest.raises(EditedSpecError, match="the spec was edited or the folder renamed"):
        bench.store.open("ffff")


def test_a_folder_without_a_spec_is_no_set(bench) -> None:
    bench.filled(SAMPLES)
    (bench.folder() / "spec.json").unlink()
    assert bench.store.keys() == []
    assert bench.store.find(SPEC) is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", 0, "format: Input should be 1"),
        ("format", 2, "format: Input should be 1"),
        ("extra", 1, "extra: Extra inputs are not permitted"),
        ("key", None, "key: Input should be a valid string"),
        ("partition_bits", 17, "partition_bits: Input should be less than or equal to 16"),
    ],
)
def test_a_spec_of_another_form_names_the_field(
    bench, field: str, value: object, message: str
) -> None:
    bench.create()
    bench.edit(bench.folder() / "spec.json", lambda document: document.update({field: value}))
    with pytest.raises(FormatError, match=f"is not a LabelSetDocument of format 1: {message}"):
        bench.fresh()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff", b"{", b"[" * 10**5], ids=lambda content: content[:4]
)
def test_a_spec_that_is_no_json_object_is_refused(bench, content: bytes) -> None:
    bench.create()
    (bench.folder() / "spec.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"spec\.json is not a LabelSetDocument"):
        bench.fresh()


def test_a_damaged_set_of_somebody_else_stops_no_plan(bench) -> None:
    bench.filled(SAMPLES)
    other = make_spec(k=4)
    bench.create(other)
    (bench.folder(other) / "spec.json").write_bytes(b"{")
    assert bench.store.plan(SPEC, [sample.key for sample in SAMPLES]).hits.all()


def test_a_damaged_history_of_another_set_stops_no_plan(bench) -> None:
    """Its samples do not count, though: they cannot be read."""
    wide = make_spec(k=16)
    bench.filled([make_sample(0, wide)], spec=wide)
    bench.files("commits/*", wide)[0].write_bytes(b"{")
    assert bench.store.plan(SPEC, [SAMPLES[0].key]).misses.all()
    with pytest.raises(FormatError):
        bench.store.plan(wide, [SAMPLES[0].key])


# -- selections ------------------------------------------------------------------------------------
def test_selections_are_listed_and_the_damaged_ones_named(bench) -> None:
    objects = bench.store.objects
    keys = []
    for sample in SAMPLES[:3]:
        request = SampleRequest(sample.key, 0, sample.prompt_ids_P, None, ())
        keys.append(Selection((request,)).save(objects))
    assert bench.store.selections() == sorted(keys)
    assert bench.store.selection(keys[0]).sample_keys == [SAMPLES[0].key]
    assert bench.store.damaged_selections() == {}
    folder = bench.root / "selections"
    (folder / f"{keys[0]}.arrow").write_bytes(b"")
    (folder / f"{keys[1]}.arrow").rename(folder / f"{'f' * 32}.arrow")
    found = bench.store.damaged_selections()
    assert sorted(found) == sorted([f"selections/{keys[0]}.arrow", f"selections/{'f' * 32}.arrow"])


# -- dropped sets ----------------------------------------------------------------------------------
def test_a_dropped_set_is_gone_and_can_be_made_again(bench) -> None:
    label_set = bench.filled(SAMPLES)
    drop(label_set, {})
    assert bench.store.keys() == []
    assert bench.store.find(SPEC) is None
    assert bench.store.plan(SPEC, [SAMPLES[0].key]).misses.all()
    again = bench.create()
    assert again.totals().num_samples == 0
    again.append(SAMPLES[:2], {})
    bench.assert_serves(SAMPLES[:2], SAMPLES)
