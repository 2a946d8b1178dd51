"""Sidecars keep numbers beside labels: committed in parts, one value per labelled position."""

import numpy as np
import polars as pl
import pytest

from storage.compact import compact
from storage.errors import (
    BadLabelError,
    EditedSpecError,
    FormatError,
    LabelStoreError,
    NotLabelledError,
)
from storage.garbage import drop
from storage.repair import repair
from storage.sidecar import SidecarSpec, list_sidecars
from storage.testing import make_sample, make_spec

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC, num_tokens=3 + number % 3) for number in range(6)]
KEYS = [sample.key for sample in SAMPLES]
PRODUCER = SidecarSpec(producer={"student": "s" * 32}, columns=("gap", "kl"))


def values(numbers, *, plus: float = 0.0) -> dict[str, dict[str, np.ndarray]]:
    """For sample n: kl = n, n + 1/8, ...; gap = -kl."""
    found = {}
    for number in numbers:
        kl = number + plus + np.arange(len(SAMPLES[number].positions_N)) / 8
        found[KEYS[number]] = {"kl": kl, "gap": -kl}
    return found


@pytest.fixture
def label_set(bench):
    return bench.filled(SAMPLES[:3], SAMPLES[3:])


def test_numbers_read_as_they_were_added_in_any_order(bench, label_set) -> None:
    assert label_set.sidecar(PRODUCER).append(values([2, 0, 5])) == 1
    reader = bench.fresh().sidecar(PRODUCER)
    order = [5, 0, 2, 0]
    for number, found in zip(order, reader.read([KEYS[n] for n in order]), strict=True):
        expected = values([number])[KEYS[number]]
        assert sorted(found) == ["gap", "kl"]
        for name in found:
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], expected[name].astype(np.float32))


def test_of_a_sample_in_two_parts_the_first_is_served(bench, label_set) -> None:
    sidecar = label_set.sidecar(PRODUCER)
    assert sidecar.append(values([0, 1])) == 1
    assert sidecar.append(values([1, 2], plus=100)) == 2
    found = [row["kl"][0] for row in bench.fresh().sidecar(PRODUCER).read(KEYS[:3])]
    assert found == [0, 1, 102]
    assert len(sidecar.to_arrow()) == 3 + 4 + 5


def test_two_producers_do_not_meet(label_set) -> None:
    other = SidecarSpec(producer={"student": "t" * 32}, columns=("gap", "kl"))
    label_set.sidecar(PRODUCER).append(values([0]))
    label_set.sidecar(other).append(values([0], plus=7))
    assert next(label_set.sidecar(PRODUCER).read(KEYS[:1]))["kl"][0] == 0
    assert next(label_set.sidecar(other).read(KEYS[:1]))["kl"][0] == 7
    assert {spec.key for spec in list_sidecars(label_set)} == {PRODUCER.key, other.key}


def test_a_part_lost_to_another_writer_gets_the_next_number(bench, label_set) -> None:
    ours = bench.raced(
        lambda: label_set.sidecar(PRODUCER).append(values([0])), path="/parts/"
    ).sidecar(PRODUCER)
    assert ours.append(values([1])) == 2
    assert len(list(ours.read(KEYS[:2]))) == 2


def test_a_death_at_any_change_leaves_a_sidecar_that_can_be_read(bench, label_set) -> None:
    """The spec, then the part."""
    for calls, served in ((0, 0), (1, 0), (2, 3)):
        try:
            bench.dying(calls).sidecar(PRODUCER).append(values([0]))
        except bench.killed:
            assert calls < 2
        assert len(label_set.sidecar(PRODUCER).to_arrow()) == served


def test_sidecars_survive_compaction(bench, label_set) -> None:
    label_set.sidecar(PRODUCER).append(values(range(6)))
    compact(label_set, {})
    found = bench.fresh().sidecar(PRODUCER).read(KEYS)
    assert [row["kl"][0] for row in found] == list(range(6))


def test_a_partly_labelled_sample_has_numbers_at_its_positions(
    bench, score_mode, labelled_in_part
) -> None:
    spec = score_mode(SPEC)
    sample = labelled_in_part(SAMPLES[2], [1, 3])
    sidecar = bench.filled([sample], spec=spec).sidecar(PRODUCER)
    sidecar.append({sample.key: {"kl": [1, 2], "gap": [3, 4]}})
    assert sidecar.to_arrow()["position"].to_pylist() == [1, 3]


def test_other_readers_open_a_part(bench, label_set) -> None:
    label_set.sidecar(PRODUCER).append(values([0]))
    (part,) = bench.files("sidecars/*/parts/*")
    assert pl.read_ipc(part).to_dict(as_series=False) == {
        "sample_key": [KEYS[0]] * 3,
        "position": [0, 1, 2],
        "token_id": SAMPLES[0].token_ids_N.tolist(),
        "token_logprob": SAMPLES[0].token_logprob_N.tolist(),
        "gap": [0.0, -0.125, -0.25],
        "kl": [0.0, 0.125, 0.25],
    }


def test_an_unused_sidecar_is_empty(label_set) -> None:
    sidecar = label_set.sidecar(PRODUCER)
    labels = ["sample_key", "position", "token_id", "token_logprob"]
    assert sidecar.to_arrow().column_names == [*labels, "gap", "kl"]
    assert len(sidecar.to_arrow()) == 0
    with pytest.raises(NotLabelledError, match=f"no numbers for the labels of sample {KEYS[0]}"):
        next(sidecar.read(KEYS))
    assert list_sidecars(label_set) == []


def test_adding_nothing_is_no_error(label_set) -> None:
    label_set.sidecar(PRODUCER).append({})
    assert len(label_set.sidecar(PRODUCER).to_arrow()) == 0


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "columns",
    [
        {"kl": [1, 2, 3]},
        {"kl": [1, 2, 3], "gap": [1, 2]},
        {"kl": [1, 2, 3], "gap": [1, 2, 3, 4]},
        {"kl": [1, 2, 3], "gap": [1, np.nan, 3]},
        {"kl": [1, 2, 3], "gap": [1, np.inf, 3]},
        {"kl": [1, 2, 3], "gap": [[1], [2], [3]]},
    ],
    ids=["missing", "short", "long", "nan", "infinite", "shape"],
)
def test_anything_but_one_finite_number_per_position_is_refused(bench, label_set, columns) -> None:
    before = bench.contents()
    with pytest.raises(BadLabelError, match=r"sidecar column 'gap' .* must be 3 finite numbers"):
        label_set.sidecar(PRODUCER).append({KEYS[0]: columns})
    assert bench.contents() == before


def test_numbers_for_a_sample_that_is_not_stored_are_refused(label_set) -> None:
    unknown = make_sample(50, SPEC)
    with pytest.raises(NotLabelledError):
        label_set.sidecar(PRODUCER).append({unknown.key: {"kl": [1] * 5, "gap": [1] * 5}})


@pytest.mark.parametrize(
    "columns", [(), ("kl", "gap"), ("kl", "kl"), ("KL",), ("k l",), ("../kl",), ("1kl",)], ids=str
)
def test_columns_are_plain_names_in_order(columns: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="columns"):
        SidecarSpec(producer={}, columns=columns)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "empty"])
def test_a_damaged_part_is_refused(bench, label_set, how: str) -> None:
    sidecar = label_set.sidecar(PRODUCER)
    sidecar.append(values([0]))
    sidecar.append(values([1]))
    first, _ = bench.files("sidecars/*/parts/*")
    if how == "missing":
        first.unlink()
    elif how == "flipped":
        data = first.read_bytes()
        bench.damage(first, byte=data.index(b"\x28\xb5\x2f\xfd") + 12)  # a zstd buffer
    else:
        first.write_bytes(b"" if how == "empty" else first.read_bytes()[:-1])
    with pytest.raises(LabelStoreError, match=first.name):
        bench.fresh().sidecar(PRODUCER).to_arrow()


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_damaged_part_is_found_and_given_up(bench, label_set, how: str) -> None:
    """Its numbers can be computed again; those of other parts stay."""
    sidecar = label_set.sidecar(PRODUCER)
    sidecar.append(values([0]))
    sidecar.append(values([1]))
    first, _ = bench.files("sidecars/*/parts/*")
    if how == "missing":
        first.unlink()
    else:
        first.write_bytes(first.read_bytes()[:-1])
    problems = list(label_set.verify())
    assert [(found.what, found.lost_samples) for found in problems] == [("sidecar", 0)]
    repair(label_set, problems, {})
    assert list(label_set.verify()) == []
    assert next(sidecar.read([KEYS[1]]))["kl"][0] == 1
    with pytest.raises(NotLabelledError):
        next(sidecar.read([KEYS[0]]))
    sidecar.append(values([0], plus=50))
    assert next(sidecar.read([KEYS[0]]))["kl"][0] == 50


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_damaged_spec_is_found_and_written_anew_by_the_producer(
    bench, label_set, content: bytes | None
) -> None:
    sidecar = label_set.sidecar(PRODUCER)
    sidecar.append(values([0]))
    (spec,) = bench.files("sidecars/*/spec.json")
    if content is None:
        spec.unlink()
    else:
        spec.write_bytes(content)
    problems = list(label_set.verify())
    assert [found.what for found in problems] == ["sidecar"]
    repair(label_set, problems, {})
    sidecar.append(values([1]))
    assert list(label_set.verify()) == []
    assert list_sidecars(label_set) == [PRODUCER]


def test_numbers_of_lost_labels_are_not_served_for_new_ones(bench, label_set) -> None:
    """Sample 2 of 5 tokens is lost, and labelled anew with a response of 3 tokens."""
    sidecar = label_set.sidecar(PRODUCER)
    sidecar.append(values([2]))
    drop(label_set, {})
    anew = bench.create()
    other = make_sample(2, SPEC, num_tokens=3)
    assert other.key == KEYS[2]
    anew.append([other], {})
    try:
        found = next(anew.sidecar(PRODUCER).read([KEYS[2]]))
    except LabelStoreError:
        return
    assert len(found["kl"]) == len(other.positions_N)


def test_a_part_of_another_producer_is_refused(bench, label_set) -> None:
    other = SidecarSpec(producer={"student": "t" * 32}, columns=PRODUCER.columns)
    label_set.sidecar(PRODUCER).append(values([0]))
    label_set.sidecar(other).append(values([0]))
    parts = {path.parents[1].name: path for path in bench.files("sidecars/*/parts/*")}
    parts[other.key].write_bytes(parts[PRODUCER.key].read_bytes())
    with pytest.raises(FormatError):
        label_set.sidecar(other).to_arrow()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"producer": {}, "columns": ["kl"]}'])
def test_an_edited_spec_is_refused(bench, label_set, content: bytes) -> None:
    label_set.sidecar(PRODUCER).append(values([0]))
    bench.files("sidecars/*/spec.json")[0].write_bytes(content)
    with pytest.raises(EditedSpecError, match=r"spec\.json"):
        list_sidecars(label_set)


def test_the_order_of_a_producers_facts_is_not_identity() -> None:
    one = SidecarSpec(producer={"a": "1", "b": "2"}, columns=("kl",))
    other = SidecarSpec(producer={"b": "2", "a": "1"}, columns=("kl",))
    assert one.key == other.key
    assert one.key != replace_columns(one, ("gap",)).key


def replace_columns(spec: SidecarSpec, columns: tuple[str, ...]) -> SidecarSpec:
    return spec.model_copy(update={"columns": columns})
