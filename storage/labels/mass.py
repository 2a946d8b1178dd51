"""The smallest head of every position that reaches a given probability (adaptive k).

The planes are those of the top-k kind, as wide as the cap, with zeros behind the head of a row; a
column counts the tokens of each row. zstd packs the zeros of a row into 4 to 6 bytes where heads
are short. Lists of varying length would need an offset per row and plane, which zstd packs badly:
12 bytes per row, even where every head is as long as the cap.
``docs/format.md`` section 5 is the specification.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.errors import BadLabelError
from storage.keys import MassSpec, TopKSpec
from storage.labels.base import UNUSED_ID, DecodedLabels, LabelKind
from storage.labels.topk import (
    check_width,
    from_planes,
    plane_bytes,
    plane_columns,
    plane_fields,
    to_planes,
)

COUNT = "topk_n"


class Mass(LabelKind[MassSpec]):
    """As many tokens as reach ``mass`` together, at most ``cap``."""

    def fields(self) -> list[pa.Field]:
        """The count and the planes."""
        return [pa.field(COUNT, pa.int32(), nullable=False), *plane_fields(self.spec.cap)]

    def encode(
        self, ids_NK: npt.NDArray[np.int32], logprobs_NK: npt.NDArray[np.float32]
    ) -> list[pa.Array]:
        """See the base class.

        Raises:
            BadLabelError: also if a row is empty, or a token stands behind an unused entry.
        """
        check_width(ids_NK, logprobs_NK, self.spec.cap)
        used_NK = ids_NK != UNUSED_ID
        counts_N = used_NK.sum(axis=1, dtype=np.int32)
        if (counts_N == 0).any():
            raise BadLabelError("a position keeps no token")
        if (used_NK != self._heads(counts_N)).any():
            raise BadLabelError(f"a token stands behind an unused entry (id {UNUSED_ID})")
        if (used_NK == np.isneginf(logprobs_NK)).any():
            raise BadLabelError("log-probs must be minus infinity exactly where ids are unused")
        planes = to_planes(np.where(used_NK, ids_NK, 0), logprobs_NK)
        return [pa.array(counts_N), *plane_columns([plane_NK * used_NK for plane_NK in planes])]

    def decode(self, columns: Mapping[str, pa.Array]) -> DecodedLabels:
        """See the base class."""
        ids_NK, logprobs_NK = from_planes(plane_bytes(columns, self.spec.cap))
        unused_NK = ~self._heads(columns[COUNT].to_numpy())
        np.copyto(ids_NK, UNUSED_ID, where=unused_NK)
        np.copyto(logprobs_NK, -np.inf, where=unused_NK)
        return ids_NK, logprobs_NK

    def _heads(self, counts_N: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        return np.arange(self.spec.cap, dtype=np.int32) < counts_N[:, None]

    def head_sizes(self, logprobs_NK: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """As many tokens as reach the mass, or the cap, or all there are."""
        mass_NK = np.cumsum(np.exp(logprobs_NK[:, : self.spec.cap].astype(np.float64)), axis=1)
        short_N: npt.NDArray[np.int64] = (mass_NK < self.spec.mass).sum(axis=1)
        return np.minimum(short_N + 1, mass_NK.shape[1])

    def covers(self, other: TopKSpec | MassSpec) -> bool:
        """Whether ``other`` has at most the mass and the cap of this kind."""
        return (
            isinstance(other, MassSpec)
            and other.mass <= self.spec.mass
            and other.cap <= self.spec.cap
        )
