"""What a label kind must offer to be stored."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.keys import MassSpec, TopKSpec

Spec = TypeVar("Spec", TopKSpec, MassSpec)

DecodedLabels = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""Ids int32[N, K], likeliest first, and log-probs float32[N, K] in nats."""

UNUSED_ID = -1
"""Id of an unused entry, in rows that keep fewer tokens than the widest."""


class LabelKind(ABC, Generic[Spec]):
    """Encodes the soft labels of N positions into Arrow columns and back.

    In memory every kind is a pair of arrays of its width K: ids int32[N, K], likeliest first, and
    log-probs float32[N, K] in nats. A row that keeps fewer tokens ends in entries with the id
    ``UNUSED_ID`` and the log-prob minus infinity.

    Args:
        spec: The options of the kind, as they stand in the label set key.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec: Spec = spec

    @abstractmethod
    def fields(self) -> list[pa.Field]:
        """Arrow fields of the columns, in order, none nullable."""

    @abstractmethod
    def encode(
        self, ids_NK: npt.NDArray[np.int32], logprobs_NK: npt.NDArray[np.float32]
    ) -> list[pa.Array]:
        """Columns that hold ``ids_NK`` (likeliest first) and their log-probs in nats.

        Raises:
            BadLabelError: if an id does not fit three bytes or a row is not sorted.
        """

    @abstractmethod
    def decode(self, columns: Mapping[str, pa.Array]) -> DecodedLabels:
        """Labels of the N rows in verified columns, in new arrays."""

    @abstractmethod
    def head_sizes(self, logprobs_NK: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """How many of the likeliest tokens each row keeps, int64[N], at least 1.

        Args:
            logprobs_NK: float32[N, K] in nats, sorted, of any width K >= 1.
        """

    @abstractmethod
    def covers(self, other: TopKSpec | MassSpec) -> bool:
        """Whether labels of ``other`` can be made from labels of this kind by leaving out ids."""
