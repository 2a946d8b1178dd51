"""Samples that were set aside: who, why, and how they come back."""

import pytest

from storage.errors import FormatError, ShardCorruptError
from storage.quarantine import Quarantine
from storage.testing import make_sample, make_spec

SPEC = make_spec()
SAMPLES = [make_sample(number, SPEC) for number in range(4)]
KEYS = [sample.key for sample in SAMPLES]


def test_what_was_set_aside_is_known_to_every_process(bench) -> None:
    Quarantine(bench.create()).add(KEYS[1], "bad label", "mass is 2", {"backend": "vllm"})
    quarantine = Quarantine(bench.fresh())
    assert quarantine.keys() == {KEYS[1]}
    (sample,) = quarantine.samples()
    assert (sample.sample, sample.reason, sample.detail) == (KEYS[1], "bad label", "mass is 2")
    assert sample.provenance == {"backend": "vllm"}


def test_the_first_reason_stays(bench) -> None:
    quarantine = Quarantine(bench.create())
    quarantine.add(KEYS[0], "engine died", "first", {})
    quarantine.add(KEYS[0], "engine hung", "second", {})
    assert [sample.detail for sample in quarantine.samples()] == ["first"]


def test_a_sample_with_a_label_is_in_quarantine_no_longer(bench) -> None:
    label_set = bench.create()
    quarantine = Quarantine(label_set)
    for key in KEYS[:2]:
        quarantine.add(key, "engine died", "", {})
    label_set.append(SAMPLES[:1], {})
    assert quarantine.keys() == {KEYS[1]}
    assert [sample.sample for sample in quarantine.samples()] == [KEYS[1]]


def test_released_samples_are_asked_for_again(bench) -> None:
    quarantine = Quarantine(bench.create())
    for key in KEYS:
        quarantine.add(key, "bad label", "", {})
    quarantine.release(KEYS[1:])
    assert quarantine.keys() == {KEYS[0]}
    quarantine.release(KEYS)
    assert quarantine.keys() == set()
    assert list(bench.folder().glob("quarantine/*")) == []


def test_a_long_reason_is_cut(bench) -> None:
    quarantine = Quarantine(bench.create())
    quarantine.add(KEYS[0], "bad label", "x" * 10_000, {})
    assert len(quarantine.samples()[0].detail) == 4000


def test_damage_is_found(bench) -> None:
    quarantine = Quarantine(bench.create())
    quarantine.add(KEYS[0], "bad label", "some reason", {})
    (path,) = bench.files("quarantine/*")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"some", b"none"))
    with pytest.raises(ShardCorruptError, match="does not have its checksum"):
        quarantine.samples()
    path.write_bytes(data)
    path.rename(path.with_name(f"{KEYS[1]}.json"))
    with pytest.raises(FormatError, match="it was renamed"):
        quarantine.samples()
