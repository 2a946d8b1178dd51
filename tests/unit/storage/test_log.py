"""The history: numbered records without gaps, whoever writes them, however they are summed up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import FormatError, ShardCorruptError, WrongLabelSetError
from storage.log import MERGE_FACTOR, CommitLog, merge_ranges
from storage.objects import Objects
from storage.records import CommitRecord
from storage.testing import make_spec

KEY = make_spec().key
PREFIX = f"label_sets/{KEY}"


def log_of(bench) -> CommitLog:
    return CommitLog(Objects(bench.uri), PREFIX, KEY)


def record(first: int, last: int | None = None, *, writer: str = "", key: str = KEY):
    return CommitRecord(
        label_set=key,
        first=first,
        last=last or first,
        created_at="2026-01-01T00:00:00+00:00",
        provenance={"writer": writer},
    )


def written(bench, *numbers: int) -> CommitLog:
    """A history with these records, and merged ones for pairs of numbers."""
    log = log_of(bench)
    for number in numbers:
        assert log.create(record(number))
    return log


def merged(log: CommitLog, *ranges: tuple[int, int]) -> None:
    for first, last in ranges:
        assert log.create(record(first, last), merged=True)


def ranges(records) -> list[tuple[int, int]]:
    return [(found.first, found.last) for found in records]


# -- reading ---------------------------------------------------------------------------------------
def test_an_empty_history_ends_at_zero(bench) -> None:
    log = log_of(bench)
    assert list(log.refresh()) == []
    assert (log.last, log.end()) == (0, 0)


def test_records_are_read_once_and_in_order(bench) -> None:
    writer = written(bench, 1, 2)
    reader = log_of(bench)
    assert ranges(reader.refresh()) == [(1, 1), (2, 2)]
    assert list(reader.refresh()) == []
    writer.create(record(3))
    assert ranges(reader.refresh()) == [(3, 3)]
    assert reader.last == reader.end() == 3


def test_the_fewest_records_cover_the_history(bench) -> None:
    log = written(bench, *range(1, 12))
    merged(log, (1, 2), (1, 4), (3, 4), (5, 6), (7, 8), (9, 10))
    assert ranges(log_of(bench).refresh()) == [(1, 4), (5, 6), (7, 8), (9, 10), (11, 11)]
    assert ranges(log.walk(1)) == [(1, 4), (5, 6), (7, 8), (9, 10), (11, 11)]
    assert ranges(log.walk(3, 7)) == [(3, 4), (5, 6), (7, 7)]
    assert ranges(log.singles()) == [(number, number) for number in range(1, 12)]


def test_a_merged_record_that_begins_before_the_range_is_not_used(bench) -> None:
    log = written(bench, 1, 2, 3, 4)
    merged(log, (1, 3))
    assert ranges(log.walk(2, 4)) == [(2, 2), (3, 3), (4, 4)]


def test_records_may_go_once_they_are_merged(bench) -> None:
    """Nobody does it today; a reader from the start needs none of them."""
    log = written(bench, 1, 2, 3)
    merged(log, (1, 2))
    for number in (1, 2):
        (bench.root / log.path(number)).unlink()
    assert ranges(log_of(bench).refresh()) == [(1, 2), (3, 3)]


@given(st.integers(1, 40_000))
def test_merged_ranges_are_whole_powers_that_end_at_the_record(last: int) -> None:
    found = list(merge_ranges(last))
    for place, (first, end) in enumerate(found, start=1):
        assert (end, end - first + 1) == (last, MERGE_FACTOR**place)
        assert last % MERGE_FACTOR**place == 0
    assert last % MERGE_FACTOR ** (len(found) + 1) != 0


@given(st.integers(1, 3000), st.sampled_from([2, 3, 16]))
def test_merged_ranges_cover_a_history_with_few_records(last: int, factor: int) -> None:
    """With the factor f, at most f - 1 records of each of the log_f(n) sizes are left over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.log.MERGE_FACTOR", factor)
        ends: dict[int, int] = {}
        for number in range(1, last + 1):
            ends.setdefault(number, number)
            for first, end in merge_ranges(number):
                ends[first] = max(end, ends[first])
    number, steps = 1, 0
    while number <= last:
        number, steps = ends[number] + 1, steps + 1
    sizes = 1
    while factor**sizes <= last:
        sizes += 1
    assert number == last + 1
    assert steps <= sizes * (factor - 1)


# -- gaps and damage -------------------------------------------------------------------------------
def test_a_gap_is_refused(bench) -> None:
    log = written(bench, 1, 2, 3)
    (bench.root / log.path(2)).unlink()
    reader = log_of(bench)
    with pytest.raises(FormatError, match=r"00000002\.json is missing although .*00000003\.json"):
        list(reader.refresh())
    assert reader.last == 1
    with pytest.raises(FormatError, match=r"00000002\.json is missing"):
        list(reader.singles())


def test_a_renamed_record_is_refused(bench) -> None:
    log = written(bench, 1)
    first = bench.root / log.path(1)
    first.with_name("00000002.json").write_bytes(first.read_bytes())
    with pytest.raises(FormatError, match="wanted record 2 to 2, found 1 to 1"):
        list(log_of(bench).refresh())


def test_a_merged_record_is_no_single_one(bench) -> None:
    log = written(bench, 1, 2)
    merged(log, (1, 2))
    (bench.root / log.path(1, 2)).rename(bench.root / log.path(1))
    with pytest.raises(FormatError, match="wanted record 1 to 1, found 1 to 2"):
        list(log_of(bench).singles())


def test_a_record_of_another_set_is_refused(bench) -> None:
    log_of(bench).create(record(1, key="f" * 32))
    with pytest.raises(WrongLabelSetError, match=f"belongs to label set {'f' * 32}, not {KEY}"):
        list(log_of(bench).refresh())


def test_a_damaged_record_is_refused_and_reading_stops_before_it(bench) -> None:
    log = written(bench, 1, 2)
    path = bench.root / log.path(2)
    bench.edit(path, lambda document: document.update(created_at="later"), sign=False)
    reader = log_of(bench)
    with pytest.raises(ShardCorruptError, match=f"{path.name} does not have its checksum"):
        list(reader.refresh())
    assert reader.last == 1


@pytest.mark.parametrize("content", [b"", b"{}"])
def test_instead_of_a_damaged_merged_record_smaller_ones_are_read(bench, content: bytes) -> None:
    log = written(bench, 1, 2, 3, 4)
    merged(log, (1, 2), (3, 4), (1, 4))
    (bench.root / log.path(1, 4)).write_bytes(content)
    assert ranges(log_of(bench).refresh()) == [(1, 2), (3, 4)]
    (bench.root / log.path(3, 4)).write_bytes(content)
    assert ranges(log_of(bench).refresh()) == [(1, 2), (3, 3), (4, 4)]


def test_a_damaged_record_behind_what_was_read_is_no_matter(bench) -> None:
    writer = written(bench, 1, 2)
    reader = log_of(bench)
    list(reader.refresh())
    (bench.root / writer.path(1)).write_bytes(b"")
    writer.create(record(3))
    assert ranges(reader.refresh()) == [(3, 3)]


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_replacement_stands_for_a_record_that_cannot_be_read(
    bench, content: bytes | None
) -> None:
    log = written(bench, 1, 2, 3)
    path = bench.root / log.path(2)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert log.create(record(2, writer="repair"), merged=True)
    found = list(log_of(bench).refresh())
    assert ranges(found) == [(1, 1), (2, 2), (3, 3)]
    assert found[1].provenance == {"writer": "repair"}
    assert ranges(log.singles()) == [(1, 1), (2, 2), (3, 3)]
    if content is not None:  # a reader on its way looks for gaps no more
        later = log_of(bench)
        later.last = 1
        assert ranges(later.refresh()) == [(2, 2), (3, 3)]


# -- writing ---------------------------------------------------------------------------------------
def test_of_two_writers_one_gets_the_number(bench) -> None:
    assert log_of(bench).create(record(1, writer="one"))
    assert not log_of(bench).create(record(1, writer="other"))
    assert [found.provenance for found in log_of(bench).refresh()] == [{"writer": "one"}]


def test_a_retry_after_a_lost_answer_finds_its_own_record(bench) -> None:
    bench.create()
    log = bench.lossy().log
    assert log.create(record(1, writer="ours"))
    assert not log.create(record(1, writer="another"))


def test_a_record_that_was_refused_once_can_be_read_later(bench) -> None:
    """A reader that failed goes on where it stopped."""
    log = written(bench, 1, 2)
    path = bench.root / log.path(2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    reader = log_of(bench)
    with pytest.raises(FormatError):
        list(reader.refresh())
    path.write_bytes(whole)
    assert ranges(reader.refresh()) == [(2, 2)]
