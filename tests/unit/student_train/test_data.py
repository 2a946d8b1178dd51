"""Cached samples become steps and micro-batches: each once, aligned, the same for every world."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import NotLabelledError
from storage.keys import sample_key
from storage.samples import LabelledSample
from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import make_spec
from student_train.config import BatchConfig, LabelSource
from student_train.data import (
    LabelReader,
    StepPlan,
    collate,
    plan_epoch,
    split_by_padded_size,
)

SPEC = make_spec(vocab_size=100)
LENGTHS = np.array([30, 10, 20, 25, 5, 40, 15, 10])
BATCH = BatchConfig(tokens=50, micro_tokens=40)


def plans(
    lengths: np.ndarray = LENGTHS, batch: BatchConfig = BATCH, *, seed: int = 0, epoch: int = 0
) -> list[StepPlan]:
    """Steps of samples of which half the tokens are supervised."""
    return plan_epoch(lengths // 2, lengths, batch, seed=seed, epoch=epoch)


def order(steps: list[StepPlan]) -> list[int]:
    return [index for step in steps for group in step.micro_batches for index in group]


lengths_of_samples = st.lists(st.integers(2, 60), min_size=1, max_size=40).map(np.array)
budgets = st.builds(BatchConfig, tokens=st.integers(1, 150), micro_tokens=st.integers(1, 150))


# -- the plan of an epoch -------------------------------------------------------------------------
@given(lengths_of_samples, budgets, st.integers(0, 5), st.integers(0, 5))
def test_every_sample_is_in_exactly_one_micro_batch(
    lengths: np.ndarray, batch: BatchConfig, seed: int, epoch: int
) -> None:
    assert sorted(order(plans(lengths, batch, seed=seed, epoch=epoch))) == list(range(len(lengths)))


@given(lengths_of_samples, budgets)
def test_only_a_single_sample_may_exceed_the_budget_of_a_step(
    lengths: np.ndarray, batch: BatchConfig
) -> None:
    for step in plans(lengths, batch):
        assert step.num_tokens <= batch.tokens or len(order([step])) == 1


@given(lengths_of_samples, budgets)
def test_only_a_single_sample_may_exceed_the_padded_size_of_a_micro_batch(
    lengths: np.ndarray, batch: BatchConfig
) -> None:
    for step in plans(lengths, batch):
        for group in step.micro_batches:
            padded = len(group) * int(lengths[list(group)].max())
            assert padded <= batch.micro_tokens or len(group) == 1


@given(lengths_of_samples, budgets)
def test_the_counts_of_a_step_are_those_of_its_samples(
    lengths: np.ndarray, batch: BatchConfig
) -> None:
    for step in plans(lengths, batch):
        members = order([step])
        assert step.num_tokens == lengths[members].sum()
        assert step.num_supervised == (lengths[members] // 2).sum()


def test_no_step_ends_before_its_budget_is_used() -> None:
    """The next step's first sample did not fit."""
    permutation = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(LENGTHS))
    steps = plans()
    start = 0
    for step in steps[:-1]:
        start += len(order([step]))
        assert step.num_tokens + LENGTHS[permutation[start]] > BATCH.tokens


def test_the_order_of_a_seed_and_an_epoch_never_changes() -> None:
    """Pinned: a resume on another machine must see the same steps."""
    assert [sorted(order([step])) for step in plans()] == [[5], [0, 6], [1, 2, 4, 7], [3]]


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    lengths = np.full(20, 10)
    orders = {
        tuple(order(plans(lengths, seed=seed, epoch=epoch))) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_the_plan_does_not_depend_on_the_size_of_micro_batches() -> None:
    """Samples of a step, and with them its gradient, are a matter of ``tokens`` alone."""
    one = plans(batch=BatchConfig(tokens=50, micro_tokens=10))
    other = plans(batch=BatchConfig(tokens=50, micro_tokens=1000))
    assert [sorted(order([s])) for s in one] == [sorted(order([s])) for s in other]


def test_micro_batches_hold_samples_of_like_length_longest_first() -> None:
    # sorted: 40 | 30 | 25 | 20 20 -> 40 = 2 * 20 | 10 10 10 10 = 4 * 10
    lengths = np.array([10, 30, 20, 10, 40, 10, 25, 20, 10])
    groups = list(split_by_padded_size(range(9), lengths, 40))
    assert groups == [(4,), (1,), (6,), (2, 7), (0, 3, 5, 8)]


def test_no_samples_are_no_micro_batches() -> None:
    assert list(split_by_padded_size([], np.array([]), 40)) == []


# -- collating ------------------------------------------------------------------------------------
def by_hand(
    prompt: list[int], response: list[int], positions: list[int] | None = None
) -> LabelledSample:
    """A sample whose top-k at position t is (response token, 90 + t), with probability 1/2, 1/4."""
    labelled = list(range(len(response))) if positions is None else positions
    n = len(labelled)
    return LabelledSample(
        key="",
        sample_index=0,
        prompt_ids_P=np.array(prompt, np.int32),
        response_ids_R=np.array(response, np.int32),
        positions_N=np.array(labelled, np.int32),
        token_logprob_N=np.full(n, math.log(0.5), np.float32),
        token_rank_N=np.ones(n, np.int32),
        log_tail_mass_N=np.full(n, math.log(0.25), np.float32),
        topk_ids_NK=np.array([[response[t], 90 + t] for t in labelled], np.int32),
        topk_logprobs_NK=np.full((n, 2), [math.log(0.5), math.log(0.25)], np.float32),
        finish_reason="length",
    )


def test_a_row_is_the_hidden_state_that_predicts_its_token() -> None:
    """Seen elsewhere: labels one position off.

    Prompt 1 2 3, response 4 5: the state at token 3 (index 2) predicts 4, that at 4 predicts 5.
    Prompt 6, response 7 8 9 0 starts at 4 = the padded width; its state at token 6 predicts 7.
    """
    batch = collate([by_hand([1, 2, 3], [4, 5]), by_hand([6], [7, 8, 9, 0])], "sampled", SPEC)
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert batch.rows_M.tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.labels.hard_M.tolist() == [4, 5, 7, 8, 9, 0]
    # the token after a row's own place in the text is its label
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    places = [0, 1, 2, 3, 5, 6, 7, 8]  # in the text, of the 2 x 4 inputs
    assert [text[places[row] + 1] for row in batch.rows_M] == batch.labels.hard_M.tolist()


def test_shorter_samples_are_padded_on_the_right_and_masked() -> None:
    batch = collate([by_hand([1, 2, 3], [4, 5]), by_hand([6], [7, 8])], "sampled", SPEC)
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4], [6, 7, 0, 0]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.rows_M.tolist() == [2, 3, 4, 5]


def test_only_labelled_positions_get_rows() -> None:
    batch = collate([by_hand([1, 2], [3, 4, 5, 6], positions=[1, 3])], "sampled", SPEC)
    # response position 1 is text position 3, predicted at 2; position 3 is predicted at 4
    assert batch.rows_M.tolist() == [2, 4]
    assert batch.labels.hard_M.tolist() == [4, 6]
    assert batch.labels.topk_ids_MK.tolist() == [[4, 91], [6, 93]]


def test_a_response_of_one_token_to_a_prompt_of_one_token_has_one_row() -> None:
    batch = collate([by_hand([1], [2])], "sampled", SPEC)
    assert batch.input_ids_BT.tolist() == [[1]]
    assert batch.rows_M.tolist() == [0]


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 99), min_size=1), st.lists(st.integers(0, 99), min_size=1)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_every_row_of_a_batch_predicts_its_hard_label(
    texts: list[tuple[list[int], list[int]]],
) -> None:
    batch = collate([by_hand(*text) for text in texts], "sampled", SPEC)
    width = batch.input_ids_BT.shape[1]
    assert width == max(len(prompt) + len(response) - 1 for prompt, response in texts)
    predicted = []
    for row in batch.rows_M.tolist():
        prompt, response = texts[row // width]
        assert batch.attention_mask_BT.flatten()[row] == 1
        predicted.append((prompt + response)[row % width + 1])
    assert predicted == batch.labels.hard_M.tolist()
    assert len(predicted) == sum(len(response) for _, response in texts)


# -- reading from the cache -----------------------------------------------------------------------
def test_samples_are_read_by_their_place_in_the_selection(
    labels: LabelSource, samples: list[LabelledSample]
) -> None:
    """Not by the order of the store or of the training."""
    reader = LabelReader(labels)
    found = reader.read([4, 0, 4])
    assert [s.key for s in found] == [samples[4].key, samples[0].key, samples[4].key]
    assert reader.vocab_size == 40


def test_sizes_are_known_without_reading_the_labels(labels: LabelSource) -> None:
    reader = LabelReader(labels)
    assert reader.num_rows.tolist() == [2, 3, 4, 5, 6, 7]
    # prompts of 4 + number % 3 tokens
    assert reader.num_tokens.tolist() == [6, 8, 10, 9, 11, 13]


def test_a_selection_with_samples_that_were_never_labelled_is_refused(
    labels: LabelSource, samples: list[LabelledSample]
) -> None:
    store = LabelStore(labels.store)
    prompt_P = np.array([1, 2, 3], np.int32)
    requests = (SampleRequest(sample_key(prompt_P, 0), 0, prompt_P, None, ()),)
    selection = Selection(requests).save(store.objects)
    with pytest.raises(NotLabelledError, match=r"for 1 of 1 samples .*distill label"):
        LabelReader(labels.model_copy(update={"selection": selection}))


def test_labels_of_a_larger_k_serve_a_smaller_one(
    labels: LabelSource, samples: list[LabelledSample]
) -> None:
    """The set that is named holds nothing; another one holds more than it asks for."""
    spec = make_spec(k=3, vocab_size=40)
    LabelStore(labels.store).create(spec, {})
    reader = LabelReader(labels.model_copy(update={"label_set": spec.key}))
    assert reader.num_rows.tolist() == [2, 3, 4, 5, 6, 7]
    (found,) = reader.read([2])
    assert found.topk_ids_NK.tolist() == samples[2].topk_ids_NK[:, :3].tolist()
    # what the dropped tokens held is in the tail
    mass_N = np.exp(found.topk_logprobs_NK).sum(axis=1) + np.exp(found.log_tail_mass_N)
    np.testing.assert_allclose(mass_N, 1, atol=0.01)  # log-probs are stored to 1/512 nat


def test_labels_of_a_smaller_k_do_not_serve_a_larger_one(labels: LabelSource) -> None:
    spec = make_spec(k=9, vocab_size=40)
    LabelStore(labels.store).create(spec, {})
    with pytest.raises(NotLabelledError, match="for 6 of 6 samples"):
        LabelReader(labels.model_copy(update={"label_set": spec.key}))
