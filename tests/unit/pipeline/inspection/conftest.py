"""A store of chosen texts: emoji, Chinese, right-to-left, tabs, markup that wants to escape."""

from collections.abc import Callable

import pytest

from pipeline.inspection.record import InspectedSample
from pipeline.inspection.source import Inspector, find_vocabulary
from pipeline.inspection.testing import TEXTS, keys_of, make_store
from storage.label_set import LabelSet
from storage.store import LabelStore


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> LabelSet:
    """The label set of TEXTS; its store is not changed by anybody."""
    return make_store(tmp_path_factory.mktemp("inspection"))


@pytest.fixture
def uri(stored: LabelSet) -> str:
    return stored.objects.uri


@pytest.fixture
def keys(stored: LabelSet) -> dict[str, str]:
    """Sample keys by the name of their text."""
    return dict(zip(TEXTS, keys_of(stored), strict=True))


@pytest.fixture
def inspector(stored: LabelSet, uri: str) -> Inspector:
    label_set = LabelStore(uri).open(stored.key)
    return Inspector(label_set, uri, find_vocabulary(label_set, None))


@pytest.fixture
def inspected(inspector: Inspector, keys: dict[str, str]) -> Callable[[str], InspectedSample]:
    """A function that reads the sample of a text by its name."""
    return lambda name: next(inspector.read([keys[name]]))
