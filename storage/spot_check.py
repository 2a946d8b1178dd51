"""Which samples of a label set are looked at: a fair choice that anybody can repeat."""

from dataclasses import dataclass

import numpy as np

from storage.errors import NotLabelledError
from storage.index import concat, format_keys
from storage.label_set import LabelSet
from storage.partitions import Keys
from storage.sample_index import SampleIndex


@dataclass(frozen=True, slots=True)
class SpotCheck:
    """Samples of a label set in the order in which they are to be looked at."""

    sample_keys: tuple[str, ...]
    commit: int
    """Last record of the history that was known."""
    num_samples: int
    """Samples that the set held then."""


def choose_samples(label_set: LabelSet, *, rows: int, seed: int) -> SpotCheck:
    """As many samples of a label set as have a number of label rows together.

    They are those with the lowest hash of sample key, seed and last commit: every sample is as
    likely as any other, and after every commit the choice is another one. Reads the whole index and
    no shard.

    Args:
        label_set: The set; new commits are taken up first.
        rows: Label rows that are wanted; the last sample may exceed them.
        seed: Changes the choice.

    Raises:
        NotLabelledError: if the set holds no sample.
    """
    label_set.refresh()
    commit = label_set.log.last
    random = np.random.SeedSequence([seed, commit]).generate_state(1, np.uint64)

    def lowest(index: SampleIndex) -> tuple[list[str], list[int], int]:
        """Keys and rows of the lowest hashes; every sample has a row, so ``rows`` are enough."""
        found = None
        num_samples = 0
        for entries in index.live_entries():
            num_samples += len(entries)
            found = entries if found is None else concat([found, entries])
            order = np.argsort(_hashes(found.keys, random), kind="stable")
            found = found.take(order[:rows])
        if found is None:
            return [], [], 0
        return format_keys(found.keys), found.num_rows.tolist(), num_samples

    keys, num_rows, num_samples = label_set.ask(lowest, fresh=False)
    if not keys:
        raise NotLabelledError(f"label set {label_set.key} holds no sample; label some first")
    before = np.cumsum([0, *num_rows[:-1]])
    chosen = [key for key, done in zip(keys, before.tolist(), strict=True) if done < rows]
    return SpotCheck(tuple(chosen), commit, num_samples)


def _hashes(keys: Keys, random: np.ndarray) -> np.ndarray:
    """uint64[N]. Keys are digests, so multiplying by an odd number shuffles them well enough."""
    hashes: np.ndarray = keys[:, 1] * (random | np.uint64(1))
    return hashes
