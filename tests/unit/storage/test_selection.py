"""Selections: ordered lists of samples, keyed by content and verified on loading."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from storage.errors import FormatError, LabelStoreError, ShardCorruptError
from storage.keys import sample_key
from storage.objects import Objects
from storage.selection import (
    SELECTION_SCHEMA,
    SampleRequest,
    Selection,
    Source,
    load_selection,
    load_selection_index,
)


def request(number: int, *, response: list[int] | None = None, sources: int = 1) -> SampleRequest:
    prompt_P = np.array([number, 7, 8], dtype=np.int32)
    response_R = None if response is None else np.array(response, dtype=np.int32)
    return SampleRequest(
        key=sample_key(prompt_P, 0, response_ids=response_R),
        sample_index=0,
        prompt_ids_P=prompt_P,
        response_ids_R=response_R,
        sources=tuple(Source("train.jsonl", 1 + n, f"id-{number}-{n}") for n in range(sources)),
    )


SELECTION = Selection((request(3), request(1, sources=2), request(2, response=[4, 5])))


def test_a_selection_loads_as_it_was_saved(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    found = load_selection(objects, SELECTION.save(objects))
    assert found.key == SELECTION.key
    for one, other in zip(found.requests, SELECTION.requests, strict=True):
        assert (one.key, one.sample_index, one.sources) == (
            other.key,
            other.sample_index,
            other.sources,
        )
        np.testing.assert_array_equal(one.prompt_ids_P, other.prompt_ids_P)
    assert found.requests[0].response_ids_R is None
    np.testing.assert_array_equal(found.requests[2].response_ids_R, [4, 5])


def test_saving_twice_changes_nothing(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    key = SELECTION.save(objects)
    before = (tmp_path / "selections" / f"{key}.arrow").read_bytes()
    assert SELECTION.save(objects) == key
    assert (tmp_path / "selections" / f"{key}.arrow").read_bytes() == before


def test_an_empty_selection_is_a_selection(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    assert load_selection(objects, Selection(()).save(objects)).sample_keys == []


def test_order_samples_and_sources_are_the_content() -> None:
    first, second, third = SELECTION.requests
    others = [
        Selection((second, first, third)),
        Selection((first, second)),
        Selection((replace(first, sources=(Source("train.jsonl", 9, "id"),)), second, third)),
    ]
    assert len({SELECTION.key, *(other.key for other in others)}) == 4


def test_an_unknown_selection_is_named(tmp_path: Path) -> None:
    with pytest.raises(LabelStoreError, match="selection abc is not in store"):
        load_selection(Objects(str(tmp_path)), "abc")


def test_a_renamed_selection_is_refused(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    path = tmp_path / "selections" / f"{SELECTION.save(objects)}.arrow"
    path.rename(path.with_name("f.arrow"))
    with pytest.raises(FormatError, match="its content does not have the key f"):
        load_selection(objects, "f")


def test_other_token_ids_under_a_sample_key_are_refused(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    forged = replace(SELECTION.requests[0], prompt_ids_P=np.array([9, 9, 9], dtype=np.int32))
    key = Selection((forged,)).save(objects)
    with pytest.raises(FormatError, match="its content does not have the key"):
        load_selection(objects, key)


def test_the_label_mask_of_a_given_response_is_kept_and_part_of_its_key(tmp_path: Path) -> None:
    prompt_P, response_R = np.array([1, 2]), np.array([4, 5, 6])
    mask_R = np.array([True, False, True])
    key = sample_key(prompt_P, 0, response_ids=response_R, label_mask=mask_R)
    masked = SampleRequest(key, 0, prompt_P, response_R, (), mask_R)
    objects = Objects(str(tmp_path))
    (found,) = load_selection(objects, Selection((masked,)).save(objects)).requests
    assert found.label_mask_R is not None
    assert found.label_mask_R.tolist() == [True, False, True]
    assert found.is_genuine
    assert not replace(found, label_mask_R=None).is_genuine


def test_many_samples_take_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.request_table.BATCH_SAMPLES", 3)
    requests = tuple(request(number) for number in range(8))  # 3 + 3 + 2
    objects = Objects(str(tmp_path))
    key = Selection(requests).save(objects)
    data = objects.get(f"selections/{key}.arrow")
    assert pa.ipc.open_file(pa.py_buffer(data)).num_record_batches == 3
    assert load_selection(objects, key).sample_keys == [r.key for r in requests]


def test_another_schema_is_refused(tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    schema = SELECTION_SCHEMA.remove(SELECTION_SCHEMA.get_field_index("source_id"))
    with pa.ipc.new_file(sink, schema):
        pass
    objects = Objects(str(tmp_path))
    objects.create("selections/f.arrow", sink.getvalue().to_pybytes())
    with pytest.raises(FormatError, match="does not have the schema of its format"):
        load_selection(objects, "f")


def test_no_flipped_bit_changes_a_selection_that_is_served(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    key = SELECTION.save(objects)
    path = tmp_path / "selections" / f"{key}.arrow"
    whole, refused = path.read_bytes(), 0
    generator = random.Random(0)
    for _ in range(300):
        damaged, bit = bytearray(whole), generator.randrange(len(whole) * 8)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            found = load_selection(objects, key)
        except (FormatError, ShardCorruptError):
            refused += 1
        else:
            assert found.key == key
            assert [r.prompt_ids_P.tolist() for r in found.requests] == [
                r.prompt_ids_P.tolist() for r in SELECTION.requests
            ]
    assert refused > 100


def test_the_index_of_a_selection_holds_its_keys_and_sizes(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    masks = [None, [True, False, True, True], [False, True, False], [True, True]]
    requests = []
    for number, mask in enumerate(masks):
        prompt_P = np.arange(3 + number, dtype=np.int32)
        mask_R = None if mask is None else np.array(mask)
        response_R = None if mask is None else np.arange(len(mask), dtype=np.int32)
        key = sample_key(prompt_P, 0, response_ids=response_R, label_mask=mask_R)
        requests.append(SampleRequest(key, 0, prompt_P, response_R, (), mask_R))
    index = load_selection_index(objects, Selection(tuple(requests)).save(objects))
    assert list(index.sample_keys) == [request.key for request in requests]
    assert index.num_prompt_tokens_S.tolist() == [3, 4, 5, 6]
    assert index.num_last_rows_S.tolist() == [-1, 2, 1, 2]


def test_the_index_of_a_damaged_selection_is_refused(tmp_path: Path) -> None:
    objects = Objects(str(tmp_path))
    key = SELECTION.save(objects)
    file = tmp_path / f"selections/{key}.arrow"
    file.rename(file.with_name(f"{'0' * len(key)}.arrow"))
    with pytest.raises(FormatError, match="does not have the key"):
        load_selection_index(objects, "0" * len(key))
