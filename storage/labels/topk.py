"""The k likeliest tokens of every position, as byte planes.

A token id is split into three bytes and every byte goes to a column of its own, because zstd
packs columns of like bytes well and whole integers badly. A log-prob is rounded to 1/256 nat and
stored as the difference to its better neighbour in the ranking, again as two byte planes; the
running sum gives the rounded value back exactly, so the error never exceeds 1/512 nat.
``docs/format.md`` section 5 is the specification.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.errors import BadLabelError
from storage.labels.base import LabelKind

STEPS_PER_NAT = 256
ID_PLANES = ("topk_id_b0", "topk_id_b1", "topk_id_b2")
LOGPROB_PLANES = ("topk_dq_b0", "topk_dq_b1")
MAX_VOCAB_SIZE = 2**20
MAX_STEPS = 2**16 - 1
"""Log-probs below -MAX_STEPS/256 (about -256 nats) saturate there."""


class TopK(LabelKind):
    """Fixed k, log-probs to within 1/512 nat."""

    def fields(self) -> list[pa.Field]:
        plane = pa.list_(pa.uint8(), self.spec.k)
        return [pa.field(name, plane, nullable=False) for name in ID_PLANES + LOGPROB_PLANES]

    def encode(
        self, ids_NK: npt.NDArray[np.int32], logprobs_NK: npt.NDArray[np.float32]
    ) -> list[pa.Array]:
        """See the base class.

        Raises:
            BadLabelError: if an id does not fit three bytes or a row is not sorted.
        """
        if ids_NK.size and not 0 <= ids_NK.min() <= ids_NK.max() < MAX_VOCAB_SIZE:
            raise BadLabelError(f"top-k ids must lie in [0, {MAX_VOCAB_SIZE})")
        steps_NK = np.minimum(np.rint(-logprobs_NK.astype(np.float64) * STEPS_PER_NAT), MAX_STEPS)
        steps_NK = np.maximum(steps_NK, 0).astype(np.int32)
        differences_NK = np.diff(steps_NK, axis=1, prepend=0)
        if differences_NK.size and differences_NK.min() < 0:
            raise BadLabelError("top-k log-probs must be sorted, likeliest first")
        planes = [ids_NK >> shift for shift in (0, 8, 16)]
        planes += [differences_NK >> shift for shift in (0, 8)]
        return [self._plane((plane & 0xFF).astype(np.uint8)) for plane in planes]

    def decode(
        self, columns: dict[str, pa.Array]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        id_planes = [self._bytes(columns[name]) for name in ID_PLANES]
        ids = id_planes[0].astype(np.int32)
        ids |= id_planes[1].astype(np.int32) << 8
        ids |= id_planes[2].astype(np.int32) << 16
        low, high = (self._bytes(columns[name]) for name in LOGPROB_PLANES)
        steps = low.astype(np.int32)
        steps |= high.astype(np.int32) << 8
        np.cumsum(steps, axis=1, out=steps)
        return ids, steps.astype(np.float32) * np.float32(-1.0 / STEPS_PER_NAT)

    def _plane(self, bytes_NK: npt.NDArray[np.uint8]) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(bytes_NK.ravel()), self.spec.k)

    def _bytes(self, column: pa.Array) -> npt.NDArray[np.uint8]:
        flat: npt.NDArray[np.uint8] = column.flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(-1, self.spec.k)
