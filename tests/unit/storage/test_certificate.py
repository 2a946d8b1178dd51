"""Certificates as documents: numbered, never replaced, the newest one counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.certificate import (
    Certificate,
    UnfitLabelsError,
    is_current,
    is_fit,
    newest_certificate,
    publish_certificate,
    require_fit,
)
from storage.compact import compact
from storage.errors import FormatError, ShardCorruptError
from storage.label_set import LabelSet
from storage.qa import QaConfig
from storage.repair import repair
from storage.testing import make_sample, make_spec

SPEC = make_spec()


def certificate(label_set: LabelSet, number: int, *reasons: str, **changes: Any) -> Certificate:
    label_set.refresh()
    facts: dict[str, Any] = {
        "label_set": label_set.key,
        "number": number,
        "commit": label_set.log.last,
        "num_samples": 3,
        "verdict": "unfit" if reasons else "fit",
        "reasons": reasons,
        "settings": QaConfig(),
        "agreement": None,
        "drawing": None,
        "coverage": None,
        "created_at": "2026-11-22T12:00:00+00:00",
        "provenance": {"host": "h"},
    }
    return Certificate(**{**facts, **changes})


def publish(label_set: LabelSet, *reasons: str) -> Certificate:
    return publish_certificate(label_set, lambda number: certificate(label_set, number, *reasons))


@pytest.fixture
def label_set(bench: Any) -> LabelSet:
    found: LabelSet = bench.filled([make_sample(number, SPEC) for number in range(3)])
    return found


def test_a_set_without_certificate_is_fit_until_somebody_looks(label_set: LabelSet) -> None:
    assert newest_certificate(label_set) is None
    assert is_fit(label_set)
    require_fit(label_set)


def test_a_certificate_is_read_as_it_was_written(label_set: LabelSet) -> None:
    published = publish(label_set, "entropy differs")
    assert newest_certificate(label_set) == published
    assert (published.number, published.commit, published.verdict) == (1, 1, "unfit")
    assert published.checksum != "0" * 32


def test_the_newest_certificate_counts(label_set: LabelSet) -> None:
    publish(label_set, "one reason", "another reason")
    assert not is_fit(label_set)
    with pytest.raises(UnfitLabelsError, match=r"unfit by its certificate 1:\n  one reason\n  an"):
        require_fit(label_set)
    assert publish(label_set).number == 2
    assert is_fit(label_set)
    require_fit(label_set)
    publish(label_set, "worse")
    assert not is_fit(label_set)


def test_certificates_are_never_replaced(label_set: LabelSet, bench: Any) -> None:
    """Somebody takes our number in between: both certificates stay."""

    def make(number: int) -> Certificate:
        if number == 1:
            publish(bench.fresh(), "theirs")
        return certificate(label_set, number, "ours")

    ours = publish_certificate(label_set, make)
    assert (ours.number, ours.reasons) == (2, ("ours",))
    contents = [json.loads(file.read_text()) for file in bench.files("certificates/*.json")]
    assert [content["reasons"] for content in contents] == [["theirs"], ["ours"]]


def test_a_lost_answer_does_not_make_a_second_certificate(label_set: LabelSet, bench: Any) -> None:
    assert publish(bench.lossy()).number == 1
    assert len(bench.files("certificates/*.json")) == 1


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_a_damaged_certificate_is_refused(label_set: LabelSet, bench: Any, place: float) -> None:
    publish(label_set)
    (file,) = bench.files("certificates/*.json")
    data = bytearray(file.read_bytes())
    data[int(len(data) * place)] ^= 1
    file.write_bytes(data)
    with pytest.raises((ShardCorruptError, FormatError)):
        newest_certificate(label_set)
    assert publish(label_set).number == 2
    assert is_fit(label_set)


def test_a_certificate_of_another_place_is_refused(label_set: LabelSet, bench: Any) -> None:
    publish(label_set)
    (file,) = bench.files("certificates/*.json")
    file.rename(file.with_name("00000007.json"))
    with pytest.raises(FormatError, match=r"is certificate 1 of label set .*; it was renamed"):
        newest_certificate(label_set)


# -- age ------------------------------------------------------------------------------------------
def more(label_set: LabelSet) -> None:
    label_set.append([make_sample(9, SPEC)], {})


def in_one_shard(label_set: LabelSet) -> None:
    more(label_set)
    compacted = publish(label_set)
    compact(label_set, {})
    assert len(label_set.live_shards()) == 1
    assert is_current(label_set, compacted)


def damaged(label_set: LabelSet) -> None:
    root = Path(label_set.objects.uri)
    file = next(root.rglob("*.labels.arrow"))
    file.write_bytes(file.read_bytes()[:-1])
    repair(label_set, list(label_set.verify()), {})


@pytest.mark.parametrize(
    ("event", "current"),
    [(lambda label_set: None, True), (more, False), (in_one_shard, False), (damaged, True)],
    ids=["nothing", "more samples", "more, then compacted", "repaired"],
)
def test_a_certificate_is_current_until_samples_are_added(
    label_set: LabelSet, event: Callable[[LabelSet], None], current: bool
) -> None:
    found = publish(label_set)
    event(label_set)
    assert is_current(label_set, found) == current


def test_labels_that_were_lost_and_made_anew_are_to_be_certified_again(
    label_set: LabelSet, bench: Any
) -> None:
    found = publish(label_set)
    damaged(label_set)
    again = bench.fresh()
    again.append([make_sample(number, SPEC) for number in range(3)], {})
    assert not is_current(again, found)
