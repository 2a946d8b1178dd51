"""A request is answered by every set that holds enough, and planned sample by sample."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import NotLabelledError
from storage.keys import LabelSetSpec, MassSpec, TopKSpec
from storage.narrow import narrow
from storage.samples import LabelledSample
from storage.testing import make_sample, make_spec

WIDE = make_spec(k=16)
NARROW = make_spec(k=4)
PLAIN = NARROW.model_copy(update={"columns": ()})
HEADS = PLAIN.model_copy(update={"kind": MassSpec(mass=0.5, cap=8)})
TOPK_TAIL = NARROW.model_copy(update={"tail": "topk"})
OTHER_TEACHER = make_spec(k=16, seed=1)

NUMBERS = range(8)
KEYS = [make_sample(number, WIDE).key for number in NUMBERS]


def samples(spec: LabelSetSpec, numbers=NUMBERS) -> list[LabelledSample]:
    """The labels that a teacher asked for ``spec`` would make."""
    assert spec.kind.type == "topk"
    return [make_sample(number, spec) for number in numbers]


# -- planning --------------------------------------------------------------------------------------
def plan(bench, spec: LabelSetSpec, keys=KEYS) -> str:
    """One letter per sample: hit, upgrade or miss."""
    found = bench.store.plan(spec, keys)
    letters = np.full(len(keys), ".")
    for letter, mask in (("h", found.hits), ("u", found.upgrades), ("m", found.misses)):
        assert (letters[mask] == ".").all()
        letters[mask] = letter
    return "".join(letters)


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        (WIDE, "hhhhhhhh"),  # the set itself
        (NARROW, "hhhhhhhh"),  # fewer tokens
        (PLAIN, "hhhhhhhh"),  # and no entropy
        (HEADS, "hhhhhhhh"),  # heads of at most 8 tokens
        (TOPK_TAIL, "hhhhhhhh"),  # an exact tail is better than a derived one
        (make_spec(k=17), "uuuuuuuu"),  # one token more than stored
        (OTHER_TEACHER, "mmmmmmmm"),  # another generation
        (WIDE.model_copy(update={"vocab_size": 101}), "uuuuuuuu"),
    ],
)
def test_a_stored_set_answers_requests_for_less(bench, wanted: LabelSetSpec, answer: str) -> None:
    bench.filled(samples(WIDE), spec=WIDE)
    assert plan(bench, wanted) == answer


@pytest.mark.parametrize("wanted", [NARROW, WIDE, TOPK_TAIL], ids=["entropy", "more", "column"])
def test_a_set_without_entropy_can_be_upgraded(bench, wanted: LabelSetSpec) -> None:
    bench.filled(samples(PLAIN), spec=PLAIN)
    assert plan(bench, wanted) == "uuuuuuuu"


def test_a_derived_tail_does_not_answer_for_an_exact_one(bench) -> None:
    bench.filled(samples(TOPK_TAIL), spec=TOPK_TAIL)
    assert plan(bench, NARROW) == "uuuuuuuu"


def test_sets_add_up(bench) -> None:
    """Samples 0-2 as requested, 2-4 with more tokens, 4-6 with less, 7 nowhere."""
    bench.filled(samples(make_spec(k=8), range(3)), spec=make_spec(k=8))
    bench.filled(samples(WIDE, range(2, 5)), spec=WIDE)
    bench.filled(samples(NARROW, range(4, 7)), spec=NARROW)
    assert plan(bench, make_spec(k=8)) == "hhhhhuum"


SPECS = [make_spec(k=k) for k in (2, 4, 8)]
STORED = st.lists(st.tuples(st.sampled_from(range(3)), st.sets(st.sampled_from(NUMBERS))))


@settings(max_examples=25)
@given(STORED, st.sampled_from(range(3)), st.lists(st.integers(0, 9), max_size=12))
def test_a_plan_tells_hits_upgrades_and_misses_exactly(
    benches, stored: list[tuple[int, set[int]]], wanted: int, asked: list[int]
) -> None:
    """Sets of k = 2, 4 and 8: a sample of at least the wanted k is a hit, of a smaller an upgrade.

    Samples 8 and 9 are stored nowhere; a sample may be asked for twice.
    """
    bench = benches()
    largest: dict[int, int] = {}
    for which, numbers in stored:
        if numbers:
            bench.create(SPECS[which]).append(samples(SPECS[which], sorted(numbers)), {})
        for number in numbers:
            largest[number] = max(which, largest.get(number, -1))
    letters = {number: "h" if largest[number] >= wanted else "u" for number in largest}
    keys = [make_sample(number, WIDE).key for number in asked]
    assert plan(bench, SPECS[wanted], keys) == "".join(letters.get(n, "m") for n in asked)


# -- reading ---------------------------------------------------------------------------------------
def assert_narrowed(found: LabelledSample, direct: LabelledSample) -> None:
    """What was narrowed equals what would have been made directly, but for the rounding.

    Dropped log-probs were rounded by at most 1/512 nat each, so is their sum in the tail.
    """
    kept = direct.topk_ids_NK >= 0
    np.testing.assert_array_equal(found.topk_ids_NK, direct.topk_ids_NK)
    assert np.isneginf(found.topk_logprobs_NK[~kept]).all()
    assert np.abs(found.topk_logprobs_NK[kept] - direct.topk_logprobs_NK[kept]).max() <= 1 / 512
    assert np.abs(found.log_tail_mass_N - direct.log_tail_mass_N).max() <= 1 / 512 + 1e-5
    assert (found.key, found.finish_reason) == (direct.key, direct.finish_reason)
    for name in ("response_ids_R", "positions_N", "token_logprob_N", "token_rank_N"):
        np.testing.assert_array_equal(getattr(found, name), getattr(direct, name))


def test_a_smaller_k_equals_labels_made_with_it(bench) -> None:
    bench.filled(samples(WIDE), spec=WIDE)
    view = bench.store.view(NARROW)
    for found, direct in zip(view.read(KEYS), samples(NARROW), strict=True):
        assert_narrowed(found, direct)
        np.testing.assert_array_equal(found.entropy_N, direct.entropy_N)
        found.check(NARROW, stored=True)


def test_columns_that_were_not_asked_for_are_left_out(bench) -> None:
    bench.filled(samples(WIDE), spec=WIDE)
    found = next(bench.store.view(PLAIN).read(KEYS))
    assert found.entropy_N is None
    found.check(PLAIN, stored=True)


def test_heads_come_from_a_fixed_k(bench) -> None:
    """Every head reaches half of the probability with its last token, and not without it."""
    bench.filled(samples(WIDE), spec=WIDE)
    lengths = set()
    for found in bench.store.view(HEADS).read(KEYS):
        found.check(HEADS, stored=True)
        kept = (found.topk_ids_NK >= 0).sum(axis=1)
        lengths |= set(kept.tolist())
        for length, logprobs_K in zip(kept.tolist(), found.topk_logprobs_NK, strict=True):
            mass = np.exp(logprobs_K[:length].astype(np.float64))
            assert mass.sum() >= 0.5 or length == 8
            assert mass[:-1].sum() < 0.5
    assert len(lengths) > 1


def test_what_a_teacher_captures_is_narrowed_and_committed_as_what_was_asked_for(bench) -> None:
    for spec in (NARROW, PLAIN, HEADS, TOPK_TAIL):
        captured = [narrow(sample, spec) for sample in samples(WIDE)]
        bench.filled(captured, spec=spec)
        bench.assert_serves(captured, spec=spec)


def test_samples_of_several_sets_come_in_the_order_that_was_asked_for(bench) -> None:
    bench.filled(samples(WIDE, range(4)), spec=WIDE)
    bench.filled(samples(NARROW, range(4, 8)), spec=NARROW)
    order = [KEYS[number] for number in (6, 1, 7, 0, 1, 5)]
    assert [sample.key for sample in bench.store.view(NARROW).read(order)] == order


def test_its_own_set_is_read_first_then_the_one_that_holds_least(bench) -> None:
    """k = 4 of the request itself has sample 0; k = 8 samples 0 and 1; k = 16 all three."""
    marks = {}
    for spec, numbers in ((WIDE, 3), (make_spec(k=8), 2), (NARROW, 1)):
        made = samples(spec, range(numbers))
        for sample in made:  # the tail tells which set a sample came from
            sample.log_tail_mass_N[:] = np.nextafter(sample.log_tail_mass_N, np.float32(0))
        bench.filled(made, spec=spec)
        marks[spec.kind.width] = made
    view = bench.store.view(NARROW)
    assert [found.spec.kind.width for found in view.sets] == [4, 8, 16]
    found = list(view.read(KEYS[:3]))
    np.testing.assert_array_equal(found[0].log_tail_mass_N, marks[4][0].log_tail_mass_N)
    for sample, width in zip(found[1:], (8, 16), strict=True):
        assert sample.topk_ids_NK.shape[1] == 4
        direct = next(s for s in marks[width] if s.key == sample.key)
        # the tail of the wider set, and what lies between its k and 4
        rest = np.exp(direct.topk_logprobs_NK[:, 4:].astype(np.float64)).sum(axis=1)
        tail = np.log(np.exp(direct.log_tail_mass_N.astype(np.float64)) + rest)
        assert np.abs(sample.log_tail_mass_N - tail).max() <= 1 / 512


def test_lengths_are_known_without_opening_a_shard(bench) -> None:
    bench.filled(samples(WIDE, range(4)), spec=WIDE)
    longer = [make_sample(number, NARROW, num_tokens=7) for number in range(4, 8)]
    bench.filled(longer, spec=NARROW)
    for spec in (WIDE, NARROW):
        for path in bench.files("shards/*", spec):
            path.unlink()
    num_rows, num_tokens = bench.store.view(NARROW).lengths(KEYS[::-1])
    assert num_rows.tolist() == num_tokens.tolist() == [7, 7, 7, 7, 5, 5, 5, 5]


def test_a_sample_that_can_only_be_upgraded_is_not_read(bench) -> None:
    bench.filled(samples(NARROW), spec=NARROW)
    view = bench.store.view(WIDE)
    assert not view.contains(KEYS).any()
    with pytest.raises(NotLabelledError, match=rf"for 8 of 8 samples \(the first is {KEYS[0]}\)"):
        next(view.read(KEYS))
    with pytest.raises(NotLabelledError):
        view.lengths(KEYS)


def test_a_view_takes_up_what_is_committed_later(bench) -> None:
    bench.create(NARROW)
    view = bench.store.view(NARROW)
    bench.filled(samples(NARROW), spec=NARROW)
    assert view.contains(KEYS).all()


def test_an_empty_request_is_an_empty_plan(bench) -> None:
    bench.filled(samples(NARROW), spec=NARROW)
    assert plan(bench, NARROW, []) == ""
    assert list(bench.store.view(NARROW).read([])) == []


def test_heads_answer_for_shorter_heads_only(bench) -> None:
    bench.filled([narrow(sample, HEADS) for sample in samples(WIDE)], spec=HEADS)
    for kind, answer in (
        (MassSpec(mass=0.25, cap=4), "hhhhhhhh"),
        (MassSpec(mass=0.6, cap=8), "uuuuuuuu"),
        (TopKSpec(k=1), "uuuuuuuu"),
    ):
        wanted = PLAIN.model_copy(update={"kind": kind})
        assert plan(bench, wanted) == answer
    shorter = PLAIN.model_copy(update={"kind": MassSpec(mass=0.25, cap=4)})
    for found, sample in zip(bench.store.view(shorter).read(KEYS), samples(WIDE), strict=True):
        assert_narrowed(found, narrow(sample, shorter))
