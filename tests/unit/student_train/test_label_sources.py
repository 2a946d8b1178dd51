"""Filters and mixtures of a configuration become selections that nothing changes."""

from storage.samples import LabelledSample
from storage.store import LabelStore
from student_train.config import LabelSource, TrainDataConfig
from student_train.streaming.label_sources import resolve_labels
from student_train.streaming.reader import LabelReader


def test_without_settings_the_labels_are_those_of_the_project(labels: LabelSource) -> None:
    assert resolve_labels(labels, TrainDataConfig()) == (labels,)


def test_a_filter_is_resolved_into_a_selection(
    labels: LabelSource, samples: list[LabelledSample]
) -> None:
    data = TrainDataConfig.model_validate({"filter": {"min_response_tokens": 5}, "weight": 2})
    (found,) = resolve_labels(labels, data)
    assert found.weight == 2
    assert found.selection != labels.selection
    kept = LabelStore(labels.store).selection(found.selection)
    assert kept.sample_keys == [sample.key for sample in samples[3:]]
    assert LabelReader(found).num_samples == 3
    assert resolve_labels(labels, data) == (found,)


def test_a_mixture_names_labels_with_filters_and_weights_of_their_own(labels: LabelSource) -> None:
    extra = {
        "label_set": labels.label_set,
        "selection": labels.selection,
        "weight": 0.25,
        "filter": {"max_response_tokens": 3},
    }
    data = TrainDataConfig.model_validate({"mixture": [extra]})
    own, other = resolve_labels(labels, data)
    assert own == labels
    assert (other.store, other.weight) == (labels.store, 0.25)
    assert LabelReader(own, mixture=[other]).num_samples == 6 + 2
