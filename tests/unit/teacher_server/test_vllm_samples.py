"""From reported rows to samples: arrays and flat log-probs, and rows that are refused."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from storage.keys import LabelSetSpec, sample_key
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.testing import make_spec
from teacher_server.backends.vllm_capture import MOST_VIEWS, ArrayRows, require_supported
from teacher_server.backends.vllm_rows import RowLayout
from teacher_server.backends.vllm_samples import EngineRows, engine_rows, to_sample
from teacher_server.errors import CaptureError, TeacherError

K = 3
VOCAB_SIZE = 6
PADDED_SIZE = 8
RESPONSE = np.array([4, 2], dtype=np.int32)


def public_spec() -> LabelSetSpec:
    spec = make_spec(k=K, vocab_size=VOCAB_SIZE, columns=())
    return spec.model_copy(update={"tail": "topk"})


def make_request() -> SampleRequest:
    prompt = np.array([1, 2], dtype=np.int32)
    return SampleRequest(sample_key(prompt, 0), 0, prompt, None, ())


def public_rows() -> tuple[EngineRows, np.ndarray]:
    """All tokens of two rows as vLLM reports them, and their log-probs."""
    logits_RV = np.random.default_rng(0).normal(scale=2, size=(2, PADDED_SIZE))
    logits_RV[0, 7] = 9.0  # an id of the padding is the likeliest
    logprobs_RV = (logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True))).astype(
        np.float32
    )
    order = np.argsort(-logprobs_RV, axis=1)
    rows = np.arange(2)[:, None]
    ids = np.concatenate([RESPONSE[:, None], order], axis=1).astype(np.int32)
    numbers = np.concatenate(
        [logprobs_RV[rows, RESPONSE[:, None]], logprobs_RV[rows, order]], axis=1
    )
    ranks = (logprobs_RV >= numbers[:, :1]).sum(axis=1).astype(np.int32)
    return EngineRows(ids, numbers, ranks), logprobs_RV


def label(rows: EngineRows, response: np.ndarray = RESPONSE) -> LabelledSample:
    return to_sample(
        make_request(),
        response,
        rows,
        public_spec(),
        RowLayout(PADDED_SIZE),
        finish_reason="length",
        stop_reason=None,
    )


def test_ids_of_the_padding_are_left_out_of_public_rows_and_counted_in_the_tail() -> None:
    rows, logprobs_RV = public_rows()
    sample = label(rows)
    sample.check(public_spec())
    live_RV = logprobs_RV[:, :VOCAB_SIZE]
    order = np.argsort(-live_RV, axis=1)[:, :K]
    np.testing.assert_array_equal(sample.topk_ids_NK, order)
    token_R1 = np.take_along_axis(live_RV, RESPONSE[:, None].astype(np.int64), 1)
    np.testing.assert_array_equal(sample.token_rank_N, 1 + (live_RV > token_R1).sum(axis=1))
    rest = 1 - np.exp(np.take_along_axis(live_RV, order, 1).astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(np.exp(sample.log_tail_mass_N), rest, atol=1e-6)


def test_a_row_of_another_token_is_refused_by_name() -> None:
    rows, _ = public_rows()
    with pytest.raises(
        CaptureError, match=f"sample {make_request().key}: row 1 is that of token 2"
    ):
        label(rows, np.array([4, 5], dtype=np.int32))


def test_a_missing_row_is_refused_by_name() -> None:
    rows, _ = public_rows()
    with pytest.raises(CaptureError, match=f"sample {make_request().key}: vLLM gave 1 rows"):
        label(rows.pick(slice(0, 1)))


def test_a_missing_column_is_refused_by_name() -> None:
    rows, _ = public_rows()
    narrow = EngineRows(rows.ids_NC[:, :-1], rows.numbers_NC[:, :-1], rows.ranks_N)
    with pytest.raises(CaptureError, match="gave 2 rows of 8 columns for 2 labelled tokens and 9"):
        label(narrow)


def test_flat_and_array_rows_are_the_same() -> None:
    """Rows come one, several and none at a time; the first prompt token has an empty row."""
    rows, _ = public_rows()
    arrays = ArrayRows(None)
    for part in (slice(0, 1), slice(1, 1), slice(1, 2)):
        picked = rows.pick(part)
        arrays.append(picked.ids_NC, picked.numbers_NC, picked.ranks_N)
    columns = 1 + PADDED_SIZE
    flat = SimpleNamespace(
        start_indices=[0, 0, columns],
        end_indices=[0, columns, 2 * columns],
        token_ids=rows.ids_NC.ravel().tolist(),
        logprobs=rows.numbers_NC.ravel().tolist(),
        ranks=[rank for row in rows.ranks_N.tolist() for rank in (row, *range(1, columns))],
    )
    for found in (engine_rows(arrays), engine_rows(flat)):
        np.testing.assert_array_equal(found.ids_NC, rows.ids_NC)
        np.testing.assert_array_equal(found.numbers_NC, rows.numbers_NC)
        np.testing.assert_array_equal(found.ranks_N, rows.ranks_N)


def test_many_rows_stay_in_order() -> None:
    """Rows that are folded several times, and a rest."""
    steps = 3 * MOST_VIEWS + 5
    expected = np.repeat(np.arange(steps, dtype=np.int32)[:, None], 4, axis=1)
    arrays = ArrayRows(None)
    for step in range(steps):
        row = expected[step : step + 1]
        arrays.append(row, row.astype(np.float32), row[:, 0].astype(np.int64))
    found = engine_rows(arrays)
    np.testing.assert_array_equal(found.ids_NC, expected)
    np.testing.assert_array_equal(found.numbers_NC, expected)
    np.testing.assert_array_equal(found.ranks_N, expected[:, 0])
    assert found.ranks_N.dtype == np.int32


def test_at_most_some_steps_of_a_batch_are_kept_in_memory() -> None:
    arrays = ArrayRows(None)
    batches = [np.zeros((8, 4), dtype=np.int32) for _ in range(MOST_VIEWS)]
    references = [weakref.ref(batch) for batch in batches]
    for batch in batches:
        arrays.append(batch[2:3], batch[2:3].astype(np.float32), batch[2:3, 0])
    del batch, batches
    assert not any(reference() is not None for reference in references)


def test_another_vllm_is_refused_with_the_way_to_do_without_its_private_parts() -> None:
    require_supported("0.32.1")
    with pytest.raises(TeacherError, match=r"vLLM 0\.33\.0 .* 0\.32\.x.*label\.tail: topk"):
        require_supported("0.33.0")
