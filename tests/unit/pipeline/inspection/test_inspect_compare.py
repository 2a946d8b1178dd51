"""Other models on the same tokens: divergences against dense ones, and what cannot be compared."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.inspection.compare import divergence, same_tokens, stored_kl
from pipeline.inspection.source import Inspector, find_vocabulary
from pipeline.inspection.testing import keys_of, make_store
from storage.dense import label_sample_densely
from storage.errors import ConfigError, LabelStoreError
from storage.keys import LabelSetSpec, MassSpec, TopKSpec, sample_key
from storage.label_set import LabelSet
from storage.samples import LabelledSample
from storage.selection import SampleRequest
from storage.store import LabelStore
from storage.testing import make_sample, make_spec


def labelled(logprobs_RV: np.ndarray, spec: LabelSetSpec, *, score: bool = False) -> LabelledSample:
    """The same three tokens with the labels of some distributions."""
    prompt_P = np.array([1, 2], dtype=np.int32)
    response_R = np.array([3, 4, 5], dtype=np.int32)
    mask = np.ones(3, dtype=np.bool_)
    key = sample_key(prompt_P, 0)
    if score:
        key = sample_key(prompt_P, 0, response_ids=response_R, label_mask=mask)
    known = response_R if score else None
    return label_sample_densely(
        SampleRequest(key, 0, prompt_P, known, ()), response_R, logprobs_RV, spec
    )


def distributions(seed: int, vocab_size: int = 100) -> np.ndarray:
    logits_RV = np.random.default_rng(seed).normal(scale=2.0, size=(3, vocab_size))
    return logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True))


def dense_kl(p_RV: np.ndarray, q_RV: np.ndarray) -> np.ndarray:
    return (np.exp(p_RV) * (p_RV - q_RV)).sum(axis=1)


def test_labels_of_the_whole_vocabulary_have_the_dense_divergence() -> None:
    spec = make_spec(kind=TopKSpec(k=100))
    p_RV, q_RV = distributions(0), distributions(1)
    found = stored_kl(labelled(p_RV, spec), labelled(q_RV, spec))
    np.testing.assert_allclose(found, dense_kl(p_RV, q_RV), atol=1e-4)


@pytest.mark.parametrize("kinds", [(8, 8), (8, 30), (2, 100)])
def test_fewer_labels_never_make_the_divergence_larger(kinds: tuple[int, int]) -> None:
    p_RV, q_RV = distributions(2), distributions(3)
    ours, theirs = (labelled(x, make_spec(k=k)) for x, k in zip((p_RV, q_RV), kinds, strict=True))
    found = stored_kl(ours, theirs)
    assert (found <= dense_kl(p_RV, q_RV) + 1e-4).all()
    assert (found >= 0).all()
    assert found.any()


def test_the_divergence_is_that_of_shared_tokens_and_the_rest() -> None:
    p_RV, q_RV = distributions(4), distributions(5)
    ours, theirs = labelled(p_RV, make_spec(k=8)), labelled(q_RV, make_spec(k=12))
    for n, found in enumerate(stored_kl(ours, theirs)):
        shared = sorted(set(ours.topk_ids_NK[n]) & set(theirs.topk_ids_NK[n]))
        p, q = np.exp(p_RV[n, shared]), np.exp(q_RV[n, shared])
        p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
        assert found == pytest.approx((p * np.log(p / q)).sum(), abs=1e-4)


def test_equal_labels_do_not_diverge() -> None:
    sample = labelled(distributions(6), make_spec(kind=MassSpec(mass=0.9, cap=16)))
    np.testing.assert_allclose(stored_kl(sample, sample), 0.0, atol=1e-12)


def test_categories_without_mass_have_no_part() -> None:
    with np.errstate(divide="ignore"):
        p, q = np.log([[0.5, 0.5, 0.0]]), np.log([[0.25, 0.75, 0.0]])
    expected = 0.5 * np.log(2.0) + 0.5 * np.log(0.5 / 0.75)
    assert divergence(p, q)[0] == pytest.approx(expected)


def test_a_long_response_is_compared_piece_by_piece() -> None:
    spec = make_spec()
    ours, theirs = make_sample(0, spec, num_tokens=600), make_sample(0, spec, num_tokens=600)
    assert stored_kl(ours, theirs).shape == (600,)


# -- another label set ----------------------------------------------------------------------------
def set_of(store: LabelStore, sample: LabelledSample, spec: LabelSetSpec) -> LabelSet:
    label_set = store.create(spec, {})
    label_set.append([sample], {})
    return label_set


def test_the_same_tokens_are_found_in_a_set_of_mode_score(tmp_path: Path) -> None:
    spec = make_spec()
    generation = spec.generation.model_copy(update={"mode": "score", "sampling": None})
    scored_spec = spec.model_copy(update={"generation": generation})
    scored = labelled(distributions(1), scored_spec, score=True)
    other = set_of(LabelStore(str(tmp_path), create=True), scored, scored_spec)
    ours = labelled(distributions(0), spec)
    assert ours.key != scored.key
    assert same_tokens(ours, other).key == scored.key


def test_a_set_with_another_response_cannot_be_compared(tmp_path: Path) -> None:
    spec, ours = make_spec(), labelled(distributions(0), make_spec())
    request = SampleRequest(ours.key, 0, ours.prompt_ids_P, None, ())
    response_R = np.array([7, 8, 9], dtype=np.int32)
    other = label_sample_densely(request, response_R, distributions(1), spec)
    store = LabelStore(str(tmp_path), create=True)
    with pytest.raises(LabelStoreError, match="its response has other tokens"):
        same_tokens(ours, set_of(store, other, spec))
    with pytest.raises(LabelStoreError, match="does not hold the sample"):
        same_tokens(make_sample(9, spec), store.open(spec.key))


def test_two_sets_side_by_side(tmp_path: Path) -> None:
    first = make_store(tmp_path)
    second = make_store(tmp_path, seed=1)
    inspector = Inspector(first, first.objects.uri, find_vocabulary(first, None), others=[second])
    (found,) = inspector.read(keys_of(first)[:1])
    ours, theirs = found.predictions
    assert (ours.name, theirs.name) == ("labels", second.key[:12])
    assert found.disagrees_N.tolist() == (ours.argmax_N != theirs.argmax_N).tolist()
    assert found.disagrees_N.any()
    assert found.telling("kl") is theirs
    assert found.mean("kl") > 0


def test_a_set_is_not_compared_with_itself(stored: LabelSet) -> None:
    with pytest.raises(ConfigError, match="with itself"):
        Inspector(stored, "", find_vocabulary(stored, None), others=[stored])


def test_three_students_are_too_many(stored: LabelSet) -> None:
    with pytest.raises(ConfigError, match="at most 2"):
        Inspector(stored, "", find_vocabulary(stored, "ids"), students=[Path("a")] * 3)


# -- which tokenizer ------------------------------------------------------------------------------
def test_plain_ids_need_no_tokenizer(stored: LabelSet) -> None:
    assert find_vocabulary(stored, "ids")[17].data == b"<17>"


def test_a_teacher_that_is_gone_is_named(tmp_path: Path) -> None:
    spec = make_spec()
    store = LabelStore(str(tmp_path), create=True)
    label_set = store.create(spec, {"teacher": "./gone"})
    with pytest.raises(ConfigError, match=r"its teacher was './gone'.*--tokenizer DIR"):
        find_vocabulary(label_set, None)


def test_a_tokenizer_that_was_replaced_is_refused(tmp_path: Path) -> None:
    label_set = make_store(tmp_path)
    label_set.document.provenance["tokenizer"] = "another"
    with pytest.raises(ConfigError, match="is not the one of these labels"):
        find_vocabulary(label_set, None)
    find_vocabulary(label_set, str(tmp_path / "teacher"))  # the user knows better
