"""From the settings of a training to the labels that its job reads: filters are resolved here."""

from collections.abc import Iterable

from storage.certificate import require_fit_samples
from storage.filter import FilterConfig, filter_selection
from storage.selection import load_selection
from storage.store import LabelStore
from student_train.config import LabelSource, TrainDataConfig


def resolve_labels(source: LabelSource, data: TrainDataConfig) -> tuple[LabelSource, ...]:
    """The labels of the project and of the mixture, each with a selection that nothing changes.

    Args:
        source: Labels and selection of the project.
        data: Filters, weights and other labels.

    Returns:
        One per source, the project's first.

    Raises:
        ConfigError: if a filter is no condition or keeps nothing.
        LabelStoreError: if a store, label set or selection does not exist.
        NotLabelledError: if a filter needs a sample that is not stored.
    """
    others = [
        (
            LabelSource(
                store=extra.store or source.store,
                label_set=extra.label_set,
                selection=extra.selection,
                weight=extra.weight,
            ),
            extra.filter,
        )
        for extra in data.mixture
    ]
    weighted = source.model_copy(update={"weight": data.weight})
    return tuple(_filtered(part, how) for part, how in [(weighted, data.filter), *others])


def require_fit_labels(sources: Iterable[LabelSource]) -> None:
    """Refuse labels that are known to be wrong.

    Raises:
        UnfitLabelsError: if the newest certificate of a set that serves some of them refuses it.
    """
    for source in sources:
        store = LabelStore(source.store)
        spec = store.open(source.label_set).spec
        selection = load_selection(store.objects, source.selection)
        require_fit_samples(store.view(spec), selection.sample_keys)


def _filtered(source: LabelSource, how: FilterConfig) -> LabelSource:
    if how.is_empty:
        return source
    store = LabelStore(source.store)
    spec = store.open(source.label_set).spec
    selection = filter_selection(store, spec, source.selection, how)
    return source.model_copy(update={"selection": selection})
