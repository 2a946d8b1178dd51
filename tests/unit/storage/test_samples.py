"""A sample is checked before it is stored: every invariant of the format has its refusal."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from storage.columns import select_rows
from storage.errors import (
    BadLabelError,
    MassError,
    NotFiniteError,
    UnsortedError,
    VocabularyError,
)
from storage.keys import LabelSetSpec, MassSpec, sample_key
from storage.narrow import narrow
from storage.samples import LabelledSample
from storage.testing import make_sample, make_spec

SPEC = make_spec()
"""k = 8 of a vocabulary of 100 tokens."""

Change = Callable[[LabelledSample], LabelledSample]


def with_row(name: str, row: int | tuple[int, int], value: object) -> Change:
    """The sample with one row (or one cell) of one array replaced."""

    def change(sample: LabelledSample) -> LabelledSample:
        array = getattr(sample, name).copy()
        array[row] = value
        return replace(sample, **{name: array})

    return change


def with_column(name: str, row: int | tuple[int, int], value: object) -> Change:
    """The sample with one row (or one cell) of one optional column replaced."""

    def change(sample: LabelledSample) -> LabelledSample:
        array = sample.optional[name].copy()
        array[row] = value
        return replace(sample, optional={**sample.optional, name: array})

    return change


def without_last_row(name: str) -> Change:
    return lambda sample: replace(sample, **{name: getattr(sample, name)[:-1]})


def swapped_tokens(sample: LabelledSample) -> LabelledSample:
    """The two likeliest log-probs of row 3 change places."""
    logprobs = sample.topk_logprobs_NK.copy()
    logprobs[3, :2] = logprobs[3, 1::-1]
    return replace(sample, topk_logprobs_NK=logprobs)


def repeated_id(sample: LabelledSample) -> LabelledSample:
    ids = sample.topk_ids_NK.copy()
    ids[3, -1] = ids[3, 0]
    return replace(sample, topk_ids_NK=ids)


def listed_token_with_another_logprob(sample: LabelledSample) -> LabelledSample:
    """Row 3's response token becomes its likeliest token, 0.01 nat off the top-k entry."""
    response, logprobs = sample.response_ids_R.copy(), sample.token_logprob_N.copy()
    response[3] = sample.topk_ids_NK[3, 0]
    logprobs[3] = sample.topk_logprobs_NK[3, 0] - 0.01
    return replace(sample, response_ids_R=response, token_logprob_N=logprobs)


def unlisted_token_that_is_too_likely(sample: LabelledSample) -> LabelledSample:
    """Row 3's response token is outside the top-k and claims to beat its last entry."""
    response, logprobs = sample.response_ids_R.copy(), sample.token_logprob_N.copy()
    response[3] = np.setdiff1d(np.arange(100), sample.topk_ids_NK[3])[0]
    logprobs[3] = sample.topk_logprobs_NK[3, -1] + 0.01
    return replace(sample, response_ids_R=response, token_logprob_N=logprobs)


def without_positions(sample: LabelledSample) -> LabelledSample:
    return replace(sample, positions_N=sample.positions_N[:0])


VIOLATIONS: dict[str, tuple[Change, str]] = {
    "the key of another prompt": (
        with_row("prompt_ids_P", 0, 99),
        "its tokens have the key [0-9a-f]{32}",
    ),
    "the key of another index": (lambda s: replace(s, sample_index=1), "its tokens have the key"),
    "no labelled position": (without_positions, "it has no labelled position"),
    "a position beyond the response": (
        with_row("positions_N", 4, 5),
        "a position lies outside the response",
    ),
    "a negative position": (with_row("positions_N", 0, -1), "a position lies outside"),
    "positions that repeat": (with_row("positions_N", 4, 3), "positions do not increase"),
    "fewer ids than k": (
        lambda s: replace(s, topk_ids_NK=s.topk_ids_NK[:, :-1]),
        r"top-k ids are not \[5, 8\]",
    ),
    "fewer log-probs than k": (
        lambda s: replace(s, topk_logprobs_NK=s.topk_logprobs_NK[:, :-1]),
        r"log-probs are not \[5, 8\]",
    ),
    "a missing token log-prob": (
        without_last_row("token_logprob_N"),
        r"token_logprob has shape \(4,\), not \(5,\)",
    ),
    "a missing rank": (without_last_row("token_rank_N"), "token_rank has shape"),
    "a missing tail": (without_last_row("log_tail_mass_N"), "log_tail_mass has shape"),
    "a missing entropy": (
        lambda s: replace(s, optional={"entropy": s.entropy_N[:-1]}),
        "entropy has",
    ),
    "no entropy": (lambda s: replace(s, optional={}), "entropy was requested and is missing"),
    "a token log-prob that is not a number": (
        with_row("token_logprob_N", 3, np.nan),
        "token_logprob is not finite at labelled position 3",
    ),
    "an infinite tail": (
        with_row("log_tail_mass_N", 3, -np.inf),
        "log_tail_mass is not finite at labelled position 3",
    ),
    "an infinite entropy": (with_column("entropy", 3, np.inf), "entropy is not finite"),
    "a top-k log-prob that is not a number": (
        with_row("topk_logprobs_NK", 3, np.nan),
        "a top-k log-prob is not finite at labelled position 3",
    ),
    "a response id at the vocabulary's size": (
        with_row("response_ids_R", 3, 100),
        "response ids leave the vocabulary 100",
    ),
    "a negative response id": (with_row("response_ids_R", 3, -1), "response ids leave"),
    "a top-k id at the vocabulary's size": (
        with_row("topk_ids_NK", (3, 7), 100),
        "a top-k id leaves the vocabulary 100",
    ),
    "an unsorted top-k": (swapped_tokens, "top-k is not sorted at labelled position 3"),
    # e**0 = 1 of tail on top of the top-k's mass
    "mass above one": (
        with_row("log_tail_mass_N", 3, 0.0),
        "probabilities do not sum to 1 at labelled position 3",
    ),
    # without the tail the top 8 of 100 tokens are missing some mass
    "mass below one": (
        with_row("log_tail_mass_N", 3, -100.0),
        "probabilities do not sum to 1 at labelled position 3",
    ),
    "a rank of zero": (
        with_row("token_rank_N", 3, 0),
        "token_rank is below 1 at labelled position 3",
    ),
    "an id twice": (repeated_id, "top-k ids repeat at labelled position 3"),
    "a listed token with another log-prob": (
        listed_token_with_another_logprob,
        "token_logprob differs from the token's top-k entry at labelled position 3",
    ),
    "an unlisted token likelier than the top-k": (
        unlisted_token_that_is_too_likely,
        "the token is likelier than the top-k without it at labelled position 3",
    ),
}


def given_sample(labelled: list[int]) -> LabelledSample:
    """A sample of score mode, labelled at some of its 5 positions."""
    whole = make_sample(0, make_spec())
    mask_R = np.isin(np.arange(5), labelled)
    key = sample_key(whole.prompt_ids_P, 0, response_ids=whole.response_ids_R, label_mask=mask_R)
    rows = {
        name: getattr(whole, name)[labelled]
        for name in LabelledSample.__dataclass_fields__
        if name.endswith(("_N", "_NK"))
    }
    rows["optional"] = select_rows(whole.optional, labelled)
    return replace(whole, key=key, finish_reason="given", **rows)


def score_spec() -> LabelSetSpec:
    generation = SPEC.generation.model_copy(update={"mode": "score", "sampling": None})
    return SPEC.model_copy(update={"generation": generation})


@pytest.mark.parametrize("number", range(5))
def test_labels_of_a_dense_distribution_pass(number: int) -> None:
    make_sample(number, SPEC).check(SPEC)


FINER = {
    NotFiniteError: "is not finite",
    VocabularyError: "leaves? the vocabulary",
    MassError: "do not sum to 1",
    UnsortedError: "is not sorted|ids repeat",
}
"""Which problems have a class of their own; the others are plain BadLabelErrors."""


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_a_violated_invariant_is_refused_by_name(violation: str) -> None:
    change, message = VIOLATIONS[violation]
    sample = change(make_sample(0, SPEC))
    with pytest.raises(BadLabelError, match=f"sample {sample.key}: {message}") as error:
        sample.check(SPEC)
    finer = [kind for kind, problem in FINER.items() if re.search(problem, str(error.value))]
    assert [error.type] == (finer or [BadLabelError])


def test_stored_labels_may_differ_by_their_rounding_and_no_more() -> None:
    """Row 3's response token is the last of its top-k, with a log-prob that differs a little."""
    sample = make_sample(0, SPEC)
    response, token_logprob = sample.response_ids_R.copy(), sample.token_logprob_N.copy()
    response[3] = sample.topk_ids_NK[3, -1]
    # 2e-3 nat is what capture may differ by; the rounding comes on top
    token_logprob[3] = sample.topk_logprobs_NK[3, -1] + 2e-3 + 1 / 1024
    moved = replace(sample, response_ids_R=response, token_logprob_N=token_logprob)
    moved.check(SPEC, stored=True)
    with pytest.raises(BadLabelError, match="differs from the token's top-k entry"):
        moved.check(SPEC)
    token_logprob[3] += 1 / 512
    with pytest.raises(BadLabelError, match="differs from the token's top-k entry"):
        moved.check(SPEC, stored=True)


# -- adaptive k ------------------------------------------------------------------------------------
MASS = SPEC.model_copy(update={"kind": MassSpec(mass=0.25, cap=8)})
"""A quarter of the probability: 1 to 4 of 100 tokens here, never 8."""


def headed() -> LabelledSample:
    sample = narrow(make_sample(0, SPEC), MASS)
    assert (sample.topk_ids_NK[:, 0] >= 0).all()
    assert (sample.topk_ids_NK[:, -1] == -1).all()
    return sample


def test_heads_of_varying_length_pass() -> None:
    headed().check(MASS)


def one_more(sample: LabelledSample) -> LabelledSample:
    """A token in the last place of row 3, behind unused ones."""
    return with_row("topk_ids_NK", (3, 7), 99)(sample)


UNUSED_VIOLATIONS: dict[str, tuple[Change, str]] = {
    "an empty head": (with_row("topk_ids_NK", 3, -1), "no token is kept at labelled position 3"),
    "a gap": (one_more, "an unused entry stands before a used one at labelled position 3"),
    "a log-prob without a token": (
        with_row("topk_logprobs_NK", (3, 7), -50.0),
        "an unused entry has a log-prob at labelled position 3",
    ),
    "a token without a log-prob": (
        with_row("topk_logprobs_NK", (3, 0), -np.inf),
        "a top-k log-prob is not finite at labelled position 3",
    ),
    "an id below the unused one": (with_row("topk_ids_NK", (3, 0), -2), "leaves the vocabulary"),
}


@pytest.mark.parametrize("violation", UNUSED_VIOLATIONS)
def test_unused_entries_stand_last_and_hold_nothing(violation: str) -> None:
    change, message = UNUSED_VIOLATIONS[violation]
    with pytest.raises(BadLabelError, match=message):
        change(headed()).check(MASS)


def test_an_unused_entry_has_no_place_in_a_fixed_k() -> None:
    with pytest.raises(BadLabelError):
        headed().check(SPEC)


def test_entropy_may_be_absent_where_it_was_not_requested() -> None:
    spec = SPEC.model_copy(update={"columns": ()})
    replace(make_sample(0, SPEC), optional={}).check(spec)


def test_a_given_response_may_be_labelled_in_part() -> None:
    sample = given_sample([1, 3])
    sample.check(score_spec())
    assert sample.label_mask_R.tolist() == [False, True, False, True, False]
    assert sample.token_ids_N.tolist() == sample.response_ids_R[[1, 3]].tolist()


def test_the_label_mask_of_a_given_response_is_part_of_its_key() -> None:
    sample = replace(given_sample([1, 3]), positions_N=np.array([1, 4]))
    with pytest.raises(BadLabelError, match="its tokens have the key"):
        sample.check(score_spec())


def test_a_position_outside_a_given_response_is_refused() -> None:
    sample = replace(given_sample([1, 3]), positions_N=np.array([1, 5]))
    with pytest.raises(BadLabelError, match="a position lies outside the response"):
        sample.check(score_spec())
