"""Cached samples become micro-batches: aligned, in a row or padded, of one label set or more."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import NotLabelledError
from storage.keys import LabelSetSpec, sample_key
from storage.samples import LabelledSample
from storage.selection import SampleRequest, Selection
from storage.store import LabelStore
from storage.testing import label_sample_densely, make_sample, make_spec
from student_train.config import LabelSource, TrainDataConfig
from student_train.errors import PreflightError
from student_train.streaming.reader import LabelReader, collate

SPEC = make_spec(vocab_size=100)


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


# -- what is read ---------------------------------------------------------------------------------
def test_fewer_tokens_per_position_are_read_on_request(
    labels: LabelSource, samples: list[LabelledSample]
) -> None:
    reader = LabelReader(labels, data=TrainDataConfig(k=3))
    assert reader.spec.kind.width == 3
    (found,) = reader.read([2])
    assert found.topk_ids_NK.tolist() == samples[2].topk_ids_NK[:, :3].tolist()
    mass_N = np.exp(found.topk_logprobs_NK).sum(axis=1) + np.exp(found.log_tail_mass_N)
    np.testing.assert_allclose(mass_N, 1, atol=0.01)


def test_more_tokens_than_are_stored_are_refused(labels: LabelSource) -> None:
    with pytest.raises(PreflightError, match=r"k is 9, label set .* holds 8 tokens"):
        LabelReader(labels, data=TrainDataConfig(k=9))


def test_a_fork_reads_the_same(labels: LabelSource) -> None:
    reader = LabelReader(labels)
    (one,), (other,) = reader.read([3]), reader.fork().read([3])
    assert one.key == other.key
    assert one.topk_logprobs_NK.tolist() == other.topk_logprobs_NK.tolist()


# -- mixtures -------------------------------------------------------------------------------------
def another_set(
    labels: LabelSource, *, k: int = 8, seed: int = 1, count: int = 4, vocab_size: int = 40
) -> tuple[LabelSource, list[LabelledSample]]:
    """Labels of another generation in the same store."""
    store = LabelStore(labels.store)
    spec = make_spec(k=k, vocab_size=vocab_size, seed=seed)
    samples = [make_sample(100 + number, spec, num_tokens=3 + number) for number in range(count)]
    label_set = store.create(spec, {})
    label_set.append(samples, {})
    requests = tuple(SampleRequest(s.key, 0, s.prompt_ids_P, None, ()) for s in samples)
    selection = Selection(requests).save(store.objects)
    source = LabelSource(
        store=labels.store, label_set=label_set.key, selection=selection, weight=0.5
    )
    return source, samples


def test_a_mixture_numbers_the_samples_of_its_sources_on(
    labels: LabelSource, samples: list[LabelledSample]
) -> None:
    extra, others = another_set(labels)
    reader = LabelReader(labels, mixture=[extra])
    assert reader.num_samples == 10
    assert reader.weights == [1.0, 0.5]
    assert reader.source_S.tolist() == [0] * 6 + [1] * 4
    assert reader.num_rows.tolist() == [2, 3, 4, 5, 6, 7, 3, 4, 5, 6]
    found = reader.read([7, 1, 9, 0])
    expected = [others[1], samples[1], others[3], samples[0]]
    assert [s.key for s in found] == [s.key for s in expected]
    keys = [sample.key for sample in (*samples, *others)]
    assert [keys[place] for place in reader.key_order_S] == sorted(keys)


def test_a_mixture_is_read_with_what_all_its_label_sets_have(
    labels: LabelSource, samples: list[LabelledSample]
) -> None:
    extra, others = another_set(labels, k=5)
    reader = LabelReader(labels, mixture=[extra])
    assert reader.spec.kind.width == 5
    batch = collate(reader.read([0, 6]), "sampled", reader.spec)
    expected = [samples[0].topk_ids_NK[:, :5], others[0].topk_ids_NK]
    assert batch.labels.topk_ids_MK.tolist() == np.concatenate(expected).tolist()


def test_the_same_sample_of_two_teachers_is_two_samples(labels: LabelSource) -> None:
    store = LabelStore(labels.store)
    spec = make_spec(vocab_size=40, seed=7)
    twin = make_sample(0, spec, num_tokens=4)  # the prompt of the first sample, longer answered
    label_set = store.create(spec, {})
    label_set.append([twin], {})
    request = SampleRequest(twin.key, 0, twin.prompt_ids_P, None, ())
    selection = Selection((request,)).save(store.objects)
    extra = LabelSource(store=labels.store, label_set=label_set.key, selection=selection)
    reader = LabelReader(labels, mixture=[extra])
    first, second = reader.read([0, 6])
    assert first.key == second.key
    assert [len(first.positions_N), len(second.positions_N)] == [2, 4]


def test_labels_of_different_vocabularies_do_not_mix(labels: LabelSource) -> None:
    extra, _ = another_set(labels, vocab_size=50)
    with pytest.raises(PreflightError, match=r"vocabulary of 50, .* one of 40"):
        LabelReader(labels, mixture=[extra])


# -- positions ------------------------------------------------------------------------------------
def test_only_the_last_turn_is_supervised_on_request(tmp_path: Path) -> None:
    """A conversation of two answers, and one whose answer is labelled whole."""
    store = LabelStore(str(tmp_path), create=True)
    spec = score_spec()
    masks = [[True, True, False, True, True, True], [True] * 4]
    samples = [masked_sample(number, mask, spec) for number, mask in enumerate(masks)]
    label_set = store.create(spec, {})
    label_set.append(samples, {})
    requests = tuple(
        SampleRequest(s.key, 0, s.prompt_ids_P, s.response_ids_R, (), s.label_mask_R)
        for s in samples
    )
    selection = Selection(requests).save(store.objects)
    source = LabelSource(store=store.uri, label_set=label_set.key, selection=selection)
    assert LabelReader(source).num_rows.tolist() == [5, 4]
    reader = LabelReader(source, data=TrainDataConfig(supervise="last_turn"))
    assert reader.num_rows.tolist() == [3, 4]
    first, second = reader.read([0, 1])
    assert first.positions_N.tolist() == [3, 4, 5]
    assert first.topk_ids_NK.tolist() == samples[0].topk_ids_NK[2:].tolist()
    assert first.optional["entropy"].shape == (3,)
    assert second.positions_N.tolist() == [0, 1, 2, 3]
    # the tokens of the first answer are still read by the model
    assert first.response_ids_R.tolist() == samples[0].response_ids_R.tolist()
    assert collate([first], "sampled", spec).labels.hard_M.tolist() == (
        samples[0].response_ids_R[3:].tolist()
    )


def score_spec() -> LabelSetSpec:
    spec = make_spec(vocab_size=40)
    generation = spec.generation.model_copy(update={"mode": "score", "sampling": None})
    return spec.model_copy(update={"generation": generation})


def masked_sample(number: int, mask: list[bool], spec: LabelSetSpec) -> LabelledSample:
    """A given response of which some tokens are labelled."""
    random = np.random.default_rng(number)
    prompt_P = random.integers(0, 40, size=3).astype(np.int32)
    response_R = random.integers(0, 40, size=len(mask)).astype(np.int32)
    logits_RV = random.normal(size=(len(mask), 40))
    logprobs_RV = logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True))
    mask_R = np.array(mask)
    key = sample_key(prompt_P, 0, response_ids=response_R, label_mask=mask_R)
    request = SampleRequest(key, 0, prompt_P, response_R, (), mask_R)
    return label_sample_densely(request, response_R, logprobs_RV, spec)
