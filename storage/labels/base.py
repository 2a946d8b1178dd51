"""What a label kind must offer to be stored."""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.keys import TopKSpec


class LabelKind(ABC):
    """Encodes the soft labels of N positions into Arrow columns and back.

    Args:
        spec: The options of the kind, as they stand in the label set key.
    """

    def __init__(self, spec: TopKSpec) -> None:
        self.spec = spec

    @abstractmethod
    def fields(self) -> list[pa.Field]:
        """Arrow fields of the columns, in order, none nullable."""

    @abstractmethod
    def encode(
        self, ids_NK: npt.NDArray[np.int32], logprobs_NK: npt.NDArray[np.float32]
    ) -> list[pa.Array]:
        """Columns that hold ``ids_NK`` (likeliest first) and their log-probs in nats."""

    @abstractmethod
    def decode(
        self, columns: dict[str, pa.Array]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Token ids int32[N, K] and log-probs float32[N, K] in nats."""
