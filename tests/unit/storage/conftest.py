"""A store in a temporary folder, ways to damage it, and media that fail on purpose."""

import datetime
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from storage.columns import select_rows
from storage.garbage import collect, find_garbage
from storage.keys import LabelSetSpec, sample_key
from storage.label_set import LabelSet
from storage.objects import Objects
from storage.samples import LabelledSample
from storage.store import LabelStore
from storage.testing import make_spec


class RacedObjects(Objects):
    """A store where somebody else acts just before our first call of one kind."""

    def __init__(self, uri: str, act: Callable[[], object], before: str, path: str) -> None:
        super().__init__(uri)
        self._acts, self._before, self._path = [act], before, path

    def create(self, path: str, data: bytes) -> bool:
        self._raced("create", path)
        return super().create(path, data)

    def delete(self, path: str) -> None:
        self._raced("delete", path)
        super().delete(path)

    def _raced(self, what: str, path: str) -> None:
        if what == self._before and self._path in path and self._acts:
            self._acts.pop()()


class DyingObjects(Objects):
    """A store whose process dies at the n-th change, from 0: at that call and every later one."""

    def __init__(self, uri: str, calls: int) -> None:
        super().__init__(uri)
        self.calls_left = calls

    def create(self, path: str, data: bytes) -> bool:
        self._live()
        return super().create(path, data)

    def delete(self, path: str) -> None:
        self._live()
        super().delete(path)

    def _live(self) -> None:
        if self.calls_left <= 0:
            raise Killed
        self.calls_left -= 1


class Killed(BaseException):
    """No handler may swallow it, as none could stop a SIGKILL."""


class LossyObjects(Objects):
    """Every object is created, and the answer says that it existed: a retry after a lost answer."""

    def create(self, path: str, data: bytes) -> bool:
        super().create(path, data)
        return False


class Bench:
    """A store below one folder.

    Args:
        root: The folder.
    """

    killed = Killed

    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, str(root)

    # -- opening -------------------------------------------------------------------------------
    @property
    def store(self) -> LabelStore:
        """The store as a new process sees it."""
        return LabelStore(self.uri, create=True)

    def create(self, spec: LabelSetSpec | None = None, *, expected_tokens: int = 0) -> LabelSet:
        """The set of a request, made if it is not there."""
        return self.store.create(spec or make_spec(), {}, expected_tokens=expected_tokens)

    def filled(
        self, *commits: Sequence[LabelledSample], spec: LabelSetSpec | None = None
    ) -> LabelSet:
        """A set with one commit for every list of samples."""
        label_set = self.create(spec)
        for samples in commits:
            assert label_set.append(samples, {}) is not None
        return label_set

    def fresh(self, spec: LabelSetSpec | None = None) -> LabelSet:
        """The set as a new process sees it."""
        return self.store.open((spec or make_spec()).key)

    # -- media that misbehave ------------------------------------------------------------------
    def raced(
        self, act: Callable[[], object], *, before: str = "create", path: str = "/commits/"
    ) -> LabelSet:
        """The set of a process that somebody outruns once, just before it changes ``path``."""
        return LabelSet(RacedObjects(self.uri, act, before, path), self.fresh().document)

    def dying(self, calls: int) -> LabelSet:
        """The set of a process that can change the store ``calls`` times and then dies."""
        return LabelSet(DyingObjects(self.uri, calls), self.fresh().document)

    def lossy(self) -> LabelSet:
        """The set of a process that loses the answer of every request that creates something."""
        return LabelSet(LossyObjects(self.uri), self.fresh().document)

    # -- files ---------------------------------------------------------------------------------
    def folder(self, spec: LabelSetSpec | None = None) -> Path:
        """Folder of a set."""
        return self.root / "label_sets" / (spec or make_spec()).key

    def files(self, pattern: str, spec: LabelSetSpec | None = None) -> list[Path]:
        """Files of a set, sorted; one at least."""
        found = sorted(self.folder(spec).glob(pattern))
        assert found, f"no file matches {pattern}"
        return found

    def contents(self) -> dict[str, bytes]:
        """Every file of the store."""
        return {str(path): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}

    @staticmethod
    def edit(path: Path, change: Callable[[dict], object], *, sign: bool = True) -> None:
        """Change a JSON document by hand; ``sign`` makes its checksum fit."""
        document = json.loads(path.read_bytes())
        stated = document.pop("checksum")
        change(document)
        path.write_bytes(signed(document, None if sign else stated))

    @staticmethod
    def damage(path: Path, *, byte: int = -100) -> None:
        """Flip a bit of a byte."""
        data = bytearray(path.read_bytes())
        data[byte] ^= 1
        path.write_bytes(data)

    # -- what is served ------------------------------------------------------------------------
    def assert_serves(
        self,
        expected: Iterable[LabelledSample],
        universe: Iterable[LabelledSample] = (),
        spec: LabelSetSpec | None = None,
    ) -> None:
        """A new process finds exactly these samples, reads each and finds nothing damaged."""
        samples = {sample.key: sample for sample in expected}
        label_set = self.fresh(spec)
        everything = [*samples, *(sample.key for sample in universe)]
        assert label_set.contains(everything).tolist() == [key in samples for key in everything]
        for found in label_set.read(list(samples)):
            assert_same(found, samples[found.key])
        assert list(label_set.verify()) == []

    @staticmethod
    def assert_same(found: LabelledSample, expected: LabelledSample) -> None:
        """As the function."""
        assert_same(found, expected)


def signed(document: dict, checksum: str | None = None) -> bytes:
    """A document with its checksum, or with a stated one."""
    data = json.dumps({"checksum": "0" * 32, **document}).encode()
    checksum = checksum or xxhash.xxh3_128_hexdigest(data)
    return data.replace(b"0" * 32, checksum.encode(), 1)


def assert_same(found: LabelledSample, expected: LabelledSample) -> None:
    """All fields are equal but the top-k log-probs, which are within 1/512 nat."""
    for name in LabelledSample.__dataclass_fields__:
        one, other = getattr(found, name), getattr(expected, name)
        if name == "topk_logprobs_NK":
            used = other > -np.inf
            assert (np.isneginf(one) == ~used).all()
            assert np.abs(one[used] - other[used]).max() <= 1 / 512
        elif isinstance(other, np.ndarray):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
        elif name == "optional":
            assert list(one) == list(other)
            for column, values in other.items():
                np.testing.assert_array_equal(one[column], values)
                assert one[column].dtype == values.dtype
        else:
            assert one == other


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """An empty store."""
    return Bench(tmp_path)


@pytest.fixture(scope="session")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Bench]:
    """Makes an empty store with every call: for property tests, which run one test many times."""
    return lambda: Bench(tmp_path_factory.mktemp("store"))


@pytest.fixture
def score_mode() -> Callable[[LabelSetSpec], LabelSetSpec]:
    """The spec of the same teacher that scores given responses."""

    def change(spec: LabelSetSpec) -> LabelSetSpec:
        generation = spec.generation.model_copy(update={"mode": "score", "sampling": None})
        return spec.model_copy(update={"generation": generation})

    return change


@pytest.fixture
def labelled_in_part() -> Callable[[LabelledSample, Sequence[int]], LabelledSample]:
    """A sample of score mode made of a generated one, labelled at some positions only."""

    def change(sample: LabelledSample, positions: Sequence[int]) -> LabelledSample:
        response_R = sample.response_ids_R
        mask_R = np.isin(np.arange(len(response_R)), positions)
        key = sample_key(
            sample.prompt_ids_P, sample.sample_index, response_ids=response_R, label_mask=mask_R
        )
        rows = {
            name: getattr(sample, name)[list(positions)]
            for name in LabelledSample.__dataclass_fields__
            if name.endswith(("_N", "_NK"))
        }
        rows["optional"] = select_rows(sample.optional, list(positions))
        return replace(sample, key=key, finish_reason="given", **rows)

    return change


@pytest.fixture
def gc() -> Callable[..., list[str]]:
    """Deletes what nothing serves, at once; returns the deleted paths."""

    def collect_now(bench: Bench, spec: LabelSetSpec | None = None) -> list[str]:
        key = (spec or make_spec()).key
        garbage = find_garbage(bench.store.objects, key, datetime.timedelta(0))
        assert garbage.kept_for_now == 0
        collect(bench.store.objects, garbage, {})
        return sorted(garbage.paths)

    return collect_now
