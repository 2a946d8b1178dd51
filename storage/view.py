"""What a store holds for a request: its own label set and all others that satisfy it.

A label set with a larger k, or with more columns, answers a request for less: the dropped ids go
into the tail (:mod:`storage.narrow`). A set of the same generation that holds too little can be
upgraded: its responses are known, only their labels must be scored again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.errors import NotLabelledError
from storage.index import format_keys, parse_keys
from storage.keys import LabelSetSpec
from storage.label_set import LabelSet
from storage.narrow import narrow, satisfies
from storage.partitions import Keys
from storage.samples import LabelledSample

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of N requested samples; every sample is exactly one of the three."""

    hits: Bools
    """bool[N]: stored as requested, or with more than that."""
    upgrades: Bools
    """bool[N]: the response is stored, its labels hold less than requested."""
    misses: Bools
    """bool[N]: not stored at all."""


class LabelView:
    """Read-only union of the label sets that answer one request.

    Args:
        spec: The request.
        related: Label sets of the same generation key.
    """

    def __init__(self, spec: LabelSetSpec, related: Sequence[LabelSet]) -> None:
        self.spec = spec
        # its own set first, then the one that holds least beyond the request
        ordered = sorted(related, key=lambda s: (s.key != spec.key, s.spec.kind.width, s.key))
        self.sets = [found for found in ordered if satisfies(found.spec, spec)]
        """Sets that satisfy the request; a sample is read from the first that holds it."""
        self.upgradable = [found for found in ordered if not satisfies(found.spec, spec)]
        """Sets that hold the responses with too few labels."""

    def plan(self, keys: Sequence[str]) -> Plan:
        """Tell hits, upgrades and misses apart; opens no shard.

        Args:
            keys: Sample keys, N of them.
        """
        hits = self.contains(keys)
        responses = np.zeros(len(keys), dtype=np.bool_)
        for found in self.upgradable:
            responses |= found.contains(keys)
        return Plan(hits, responses & ~hits, ~responses & ~hits)

    def contains(self, keys: Sequence[str]) -> Bools:
        """bool[N]: which of the samples can be read."""
        return self._owners(keys) >= 0

    def lengths(self, keys: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Labelled positions and response tokens of every sample, int64[N] each.

        Raises:
            NotLabelledError: if one is not stored.
        """
        owners = self.owners(keys)
        num_rows = np.zeros(len(keys), dtype=np.int64)
        num_tokens = np.zeros(len(keys), dtype=np.int64)
        for number, found in enumerate(self.sets):
            mine = np.flatnonzero(owners == number)
            entries = found.locate([keys[index] for index in mine]).entries
            num_rows[mine], num_tokens[mine] = entries.num_rows, entries.num_tokens
        return num_rows, num_tokens

    def read(self, keys: Sequence[str]) -> Iterator[LabelledSample]:
        """The samples in the given order, verified, with exactly what was requested.

        Raises:
            NotLabelledError: if one is not stored.
            ShardCorruptError: if the bytes differ from what was committed.
        """
        owners = self.owners(keys).tolist()
        streams = [
            found.read([key for key, owner in zip(keys, owners, strict=True) if owner == number])
            for number, found in enumerate(self.sets)
        ]
        own_key = self.spec.key  # a digest, computed once for all samples
        for owner in owners:
            sample = next(streams[owner])
            exact = self.sets[owner].key == own_key
            yield sample if exact else narrow(sample, self.spec)

    def serving(self, keys: Sequence[str]) -> Iterator[LabelSet]:
        """Label sets from which some of the samples are read, each once."""
        owners = set(self._owners(keys).tolist())
        return (found for number, found in enumerate(self.sets) if number in owners)

    def owners(self, keys: Sequence[str] | Keys) -> npt.NDArray[np.int64]:
        """int64[N]: the place in ``sets`` of the set that serves each sample.

        Raises:
            NotLabelledError: if one is not stored.
        """
        return self._owners(keys, required=True)

    def _owners(
        self, keys: Sequence[str] | Keys, *, required: bool = False
    ) -> npt.NDArray[np.int64]:
        """As :meth:`owners`; -1 for none."""
        parsed = parse_keys(keys)
        owners = np.full(len(keys), -1, dtype=np.int64)
        # what is required is stored as a rule, and then no set has to be asked for new commits
        for fresh in (False, True) if required else (True,):
            for number, found in enumerate(self.sets):
                unowned = np.flatnonzero(owners < 0)
                there = found.contains(parsed[unowned], fresh=fresh)
                owners[unowned[there]] = number
            if (owners >= 0).all():
                return owners
        if required:
            absent = np.flatnonzero(owners < 0)
            (first,) = format_keys(parsed[absent[:1]])
            raise NotLabelledError(
                f"no label set satisfies {self.spec.key} for {len(absent)} of {len(keys)} samples "
                f"(the first is {first}); run `distill label` first"
            )
        return owners
