"""Requests as columns hold what requests as objects hold."""

import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.index import format_keys
from storage.keys import key_of, sample_key
from storage.objects import Objects
from storage.request_table import (
    RequestTable,
    RequestTableBuilder,
    merged_requests,
    unique_requests,
)
from storage.requests import SampleRequest, Source
from storage.selection import Selection, load_selection

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)
sources = st.lists(
    st.builds(Source, st.sampled_from(["a.jsonl", "b"]), st.integers(1, 9), st.text(max_size=3)),
    max_size=3,
)


@st.composite
def requests(draw: st.DrawFn) -> SampleRequest:
    prompt, index = draw(ids), draw(st.integers(0, 3))
    response = draw(st.none() | ids)
    mask = None
    if response is not None:
        length = len(response)
        mask = draw(st.none() | st.lists(st.booleans(), min_size=length, max_size=length))
    found = draw(sources)
    if draw(st.booleans()):
        found.append(Source("a.jsonl", 3, "a.jsonl:3"))  # the id of a row that brings none
    return SampleRequest(
        sample_key(prompt, index, response_ids=response, label_mask=mask),
        index,
        np.array(prompt, np.int32),
        None if response is None else np.array(response, np.int32),
        tuple(found),
        None if mask is None else np.array(mask, np.bool_),
    )


def same(one: SampleRequest, other: SampleRequest) -> bool:
    return all(
        np.array_equal(getattr(one, f.name), getattr(other, f.name))
        if isinstance(getattr(one, f.name), np.ndarray)
        else getattr(one, f.name) == getattr(other, f.name)
        for f in fields(SampleRequest)
    )


def all_same(one: list[SampleRequest], other: list[SampleRequest]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.request_table.BATCH_SAMPLES", 3)


many = st.lists(requests(), max_size=10)


@given(many, st.data())
def test_a_table_gives_back_what_it_was_made_of(
    found: list[SampleRequest], data: st.DataObject
) -> None:
    table = RequestTable.of(found)
    assert all_same(list(table), found)
    assert format_keys(table.key_array) == [request.key for request in found]
    numbers = data.draw(st.lists(st.integers(0, max(0, len(found) - 1)), max_size=8 * len(found)))
    taken = table.take(np.array(numbers, np.int64))
    assert all_same(list(taken), [found[number] for number in numbers])
    assert all_same(taken[1:3], [found[number] for number in numbers][1:3])
    assert taken.num_prompt_tokens.tolist() == [len(r.prompt_ids_P) for r in taken]
    assert taken.sample_index.tolist() == [r.sample_index for r in taken]
    assert taken.num_sources.tolist() == [len(r.sources) for r in taken]
    responses = [[] if r.response_ids_R is None else r.response_ids_R for r in taken]
    assert taken.num_response_tokens.tolist() == [*map(len, responses)]
    masks = [np.ones(0, bool) if r.label_mask_R is None else r.label_mask_R for r in taken]
    assert taken.num_unlabelled_tokens.tolist() == [int((~mask).sum()) for mask in masks]


@given(many)
def test_keys_of_a_builder_are_those_of_single_samples(found: list[SampleRequest]) -> None:
    builder = RequestTableBuilder()
    for r in found:
        builder.add(
            r.prompt_ids_P,
            r.sample_index,
            response_ids=r.response_ids_R,
            label_mask=r.label_mask_R,
            sources=r.sources,
        )
    assert format_keys(builder.table().key_array) == [request.key for request in found]


@given(many)
def test_equal_requests_are_merged_with_their_sources_in_order(found: list[SampleRequest]) -> None:
    expected: dict[str, tuple[Source, ...]] = {}
    for request in found:
        expected[request.key] = expected.get(request.key, ()) + request.sources
    merged = merged_requests(RequestTable.of(found))
    assert [(r.key, r.sources) for r in merged] == list(expected.items())
    assert all(request.is_genuine for request in merged)


@given(many, many)
def test_of_several_tables_every_sample_is_there_once(
    one: list[SampleRequest], other: list[SampleRequest]
) -> None:
    first = {r.key: r for r in reversed([*one, *other])}
    ordered = [first[key] for key in dict.fromkeys(r.key for r in [*one, *other])]
    assert all_same(list(unique_requests([RequestTable.of(one), RequestTable.of(other)])), ordered)


@given(many, st.sets(st.integers(0, 9)))
def test_requests_are_found_by_their_keys(found: list[SampleRequest], wanted: set[int]) -> None:
    keys = [r.key for number, r in enumerate(found) if number in wanted] + ["0" * 32]
    numbers = RequestTable.of(found).find(keys).tolist()
    assert numbers == [number for number, r in enumerate(found) if r.key in keys]


@given(many)
def test_the_key_of_a_selection_is_that_of_its_canonical_json(found: list[SampleRequest]) -> None:
    covered = [[r.key, r.sample_index, [[s.file, s.line, s.id] for s in r.sources]] for r in found]
    assert Selection(found).key == key_of(covered)


def test_part_of_a_stored_selection_can_be_stored(tmp_path: Path) -> None:
    builder = RequestTableBuilder()
    for number in range(10):
        source = Source("a.jsonl", number + 1, f"a.jsonl:{number + 1}")
        builder.add([number], 0, response_ids=None, label_mask=None, sources=(source,))
    objects = Objects(str(tmp_path))
    whole = load_selection(objects, Selection(builder.table()).save(objects))
    part = Selection(whole.table.take(np.arange(1, 10, 2)))
    again = load_selection(objects, part.save(objects))
    assert all_same(list(again.requests), [whole.requests[number] for number in range(1, 10, 2)])


@given(requests())
def test_a_request_survives_the_way_to_an_engine(request: SampleRequest) -> None:
    assert same(pickle.loads(pickle.dumps(request)), request)


def test_masks_that_are_left_out_with_their_requests_leave_none() -> None:
    """Of three requests of a batch the one with a mask is a copy of an earlier one."""
    builder = RequestTableBuilder()
    for prompt, mask in ((1, [True, False]), (2, None), (3, None), (1, [True, False]), (4, None)):
        builder.add([prompt], 0, response_ids=[5, 6], label_mask=mask, sources=())
    merged = merged_requests(builder.table())
    assert [int(r.prompt_ids_P[0]) for r in merged] == [1, 2, 3, 4]
    assert [r.label_mask_R is None for r in merged] == [False, True, True, True]
