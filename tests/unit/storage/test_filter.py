"""Filters: the selection of what a condition keeps, from scalars that are computed by hand here."""

from dataclasses import replace

import numpy as np
import pytest

from storage.errors import ConfigError, NotLabelledError, ShardCorruptError
from storage.filter import FilterConfig, filter_selection, sample_facts
from storage.keys import LabelSetSpec
from storage.samples import LabelledSample
from storage.selection import SampleRequest, Selection, load_selection
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

SPEC = make_spec()


@pytest.fixture
def samples() -> list[LabelledSample]:
    """Ten answers of 2 to 11 tokens; those of odd numbers ended by themselves, one at a string."""
    made = [make_sample(number, SPEC, num_tokens=2 + number) for number in range(10)]
    odd = [replace(s, finish_reason="stop") if n % 2 else s for n, s in enumerate(made)]
    return [*odd[:3], replace(odd[3], stop_reason="it's over"), *odd[4:]]


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory, samples: list[LabelledSample]) -> LabelStore:
    """The samples in two shards, and more that no selection names."""
    store = LabelStore(str(tmp_path_factory.mktemp("store")), create=True)
    label_set = store.create(SPEC, {})
    label_set.append([*samples[6:], make_sample(50, SPEC)], {})
    label_set.append([make_sample(51, SPEC), *samples[:6]], {})
    return store


def select(samples: list[LabelledSample]) -> Selection:
    return Selection(
        tuple(SampleRequest(s.key, s.sample_index, s.prompt_ids_P, None, ()) for s in samples)
    )


def kept(store: LabelStore, samples: list[LabelledSample], **conditions: object) -> list[int]:
    """Numbers of the samples that are kept, in their order."""
    key = select(samples).save(store.objects)
    found = filter_selection(store, SPEC, key, FilterConfig.model_validate(conditions))
    keys = [sample.key for sample in samples]
    return [keys.index(key) for key in load_selection(store.objects, found).sample_keys]


def test_the_facts_of_a_sample_are_those_of_its_rows(
    store: LabelStore, samples: list[LabelledSample]
) -> None:
    rows = sample_facts(store, SPEC, select(samples)).to_pylist()
    for row, sample in zip(rows, samples, strict=True):
        entropy_N = sample.entropy_N
        assert entropy_N is not None
        assert row["sample_key"] == sample.key
        assert row["prompt_tokens"] == len(sample.prompt_ids_P)
        assert row["response_tokens"] == row["label_rows"] == len(sample.response_ids_R)
        assert (row["finish_reason"], row["stop_reason"]) == (
            sample.finish_reason,
            sample.stop_reason,
        )
        assert row["mean_logprob"] == pytest.approx(sample.token_logprob_N.mean(dtype=float))
        assert row["min_logprob"] == pytest.approx(sample.token_logprob_N.min())
        tail_N = np.exp(sample.log_tail_mass_N.astype(float))
        assert row["mean_tail_mass"] == pytest.approx(tail_N.mean())
        assert row["max_tail_mass"] == pytest.approx(tail_N.max())
        assert row["mean_entropy"] == pytest.approx(entropy_N.mean(dtype=float))
        assert row["max_entropy"] == pytest.approx(entropy_N.max())


def test_conditions_on_length_and_reason(store: LabelStore, samples: list[LabelledSample]) -> None:
    assert kept(store, samples, finish_reason=["stop"]) == [1, 3, 5, 7, 9]
    assert kept(store, samples, finish_reason=["stop", "length"]) == list(range(10))
    assert kept(store, samples, min_response_tokens=9) == [7, 8, 9]
    assert kept(store, samples, max_response_tokens=3) == [0, 1]
    # prompts have 4 + number % 3 tokens: 6, 8, 10, 9, 11, 13, ...
    assert kept(store, samples, max_tokens=10) == [0, 1, 2, 3]


def test_conditions_on_entropy_and_tail(store: LabelStore, samples: list[LabelledSample]) -> None:
    entropies = [float(np.mean(s.entropy_N, dtype=float)) for s in samples]  # type: ignore[arg-type]
    middle = float(np.median(entropies))
    below = [n for n, entropy in enumerate(entropies) if entropy < middle]
    assert kept(store, samples, max_entropy=middle) == below
    assert kept(store, samples, min_entropy=middle) == [n for n in range(10) if n not in below]
    tails = [float(np.exp(s.log_tail_mass_N.astype(float)).mean()) for s in samples]
    limit = float(np.median(tails))
    assert kept(store, samples, max_tail_mass=limit) == [n for n in range(10) if tails[n] < limit]


def test_a_condition_in_sql_is_met_beside_all_others(
    store: LabelStore, samples: list[LabelledSample]
) -> None:
    sql = "response_tokens % 3 = 0 or stop_reason = 'it''s over'"
    assert kept(store, samples, sql=sql) == [1, 3, 4, 7]
    assert kept(store, samples, sql=sql, finish_reason=["stop"]) == [1, 3, 7]


def test_the_order_of_the_selection_is_kept(
    store: LabelStore, samples: list[LabelledSample]
) -> None:
    backwards = samples[::-1]
    assert kept(store, backwards, finish_reason=["stop"]) == [0, 2, 4, 6, 8]


def test_without_a_condition_the_selection_stays_what_it_is(store: LabelStore) -> None:
    assert filter_selection(store, SPEC, "anything", FilterConfig()) == "anything"


def test_labels_that_come_later_change_nothing(
    store: LabelStore, samples: list[LabelledSample]
) -> None:
    key = select(samples).save(store.objects)
    how = FilterConfig(min_response_tokens=5)
    before = filter_selection(store, SPEC, key, how)
    store.open(SPEC.key).append([make_sample(60, SPEC, num_tokens=12)], {})
    assert filter_selection(store, SPEC, key, how) == before


def test_samples_of_a_richer_set_are_filtered_by_their_narrowed_tail(
    store: LabelStore, samples: list[LabelledSample]
) -> None:
    """What is not stored in the set of the request may lie in one with more."""
    wanted = make_spec(k=4)
    assert len(sample_facts(store, wanted, select(samples))) == 10


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"sql": "no_such_column > 1"}, "the columns are sample_key, prompt_tokens"),
        ({"sql": "1 = 1); drop table samples; --"}, "is no condition on samples"),
        ({"sql": "sample_key in (select * from read_text('/etc/hostname'))"}, "is no condition"),
        ({"min_response_tokens": 500}, "keeps none of the 10 samples"),
    ],
)
def test_what_is_no_condition_or_keeps_nothing_is_refused(
    store: LabelStore,
    samples: list[LabelledSample],
    conditions: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        kept(store, samples, **conditions)


def test_entropy_must_be_stored_to_be_asked_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    spec: LabelSetSpec = make_spec(columns=())
    store = LabelStore(str(tmp_path_factory.mktemp("store")), create=True)
    sample = make_sample(0, spec)
    store.create(spec, {}).append([sample], {})
    key = select([sample]).save(store.objects)
    with pytest.raises(ConfigError, match="mean_entropy"):
        filter_selection(store, spec, key, FilterConfig(max_entropy=1.0))


def test_samples_that_were_never_labelled_are_refused(
    store: LabelStore, samples: list[LabelledSample]
) -> None:
    with pytest.raises(NotLabelledError, match="1 of 11 samples"):
        kept(store, [*samples, make_sample(99, SPEC)], min_response_tokens=2)


def test_damaged_labels_are_refused(store: LabelStore, samples: list[LabelledSample]) -> None:
    assert store.objects.root is not None
    for path in store.open(SPEC.key).files("labels"):
        file = store.objects.root / path
        data = bytearray(file.read_bytes())
        data[len(data) // 2 - 1200 : len(data) // 2] = bytes(1200)
        file.write_bytes(bytes(data))
    with pytest.raises(ShardCorruptError):
        kept(store, samples, min_response_tokens=2)
