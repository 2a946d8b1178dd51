"""The k likeliest tokens of every position, as byte planes.

A token id is split into three bytes and every byte goes to a column of its own, because zstd
packs columns of like bytes well and whole integers badly. A log-prob is rounded to 1/256 nat and
stored as the difference to its better neighbour in the ranking, again as two byte planes; the
running sum gives the rounded value back exactly, so the error never exceeds 1/512 nat.
``docs/format.md`` section 5 is the specification.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.errors import BadLabelError, NotFiniteError, UnsortedError, VocabularyError
from storage.keys import MassSpec, TopKSpec
from storage.labels.base import DecodedLabels, LabelKind

STEPS_PER_NAT = 256
ID_PLANES = ("topk_id_b0", "topk_id_b1", "topk_id_b2")
LOGPROB_PLANES = ("topk_dq_b0", "topk_dq_b1")
PLANES = ID_PLANES + LOGPROB_PLANES
MAX_VOCAB_SIZE = 2**20
MAX_STEPS = 2**16 - 1
"""Log-probs below -MAX_STEPS/256 (about -256 nats) saturate there."""


class TopK(LabelKind[TopKSpec]):
    """Fixed k, log-probs to within 1/512 nat."""

    def fields(self) -> list[pa.Field]:
        """The planes."""
        return plane_fields(self.spec.k)

    def encode(
        self, ids_NK: npt.NDArray[np.int32], logprobs_NK: npt.NDArray[np.float32]
    ) -> list[pa.Array]:
        """See the base class."""
        check_width(ids_NK, logprobs_NK, self.spec.k)
        return plane_columns(to_planes(ids_NK, logprobs_NK))

    def decode(self, columns: Mapping[str, pa.Array]) -> DecodedLabels:
        """See the base class."""
        return from_planes(plane_bytes(columns, self.spec.k))

    def head_sizes(self, logprobs_NK: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """``k`` tokens, or all there are."""
        num_rows, width = logprobs_NK.shape
        return np.full(num_rows, min(width, self.spec.k), np.int64)

    def covers(self, other: TopKSpec | MassSpec) -> bool:
        """Whether ``other`` keeps at most ``k`` tokens."""
        return bool(other.width <= self.spec.k)


# -- planes, uint8[N, K] each in the order of PLANES -----------------------------------------------
def to_planes(
    ids_NK: npt.NDArray[np.int32], logprobs_NK: npt.NDArray[np.float32]
) -> list[npt.NDArray[np.uint8]]:
    """The planes of ids and log-probs in nats, likeliest first.

    Raises:
        VocabularyError: if an id does not fit.
        NotFiniteError: if a log-prob is NaN.
        UnsortedError: if log-probs increase within a row.
    """
    if ids_NK.size and not 0 <= ids_NK.min() <= ids_NK.max() < MAX_VOCAB_SIZE:
        raise VocabularyError(f"top-k ids must lie in [0, {MAX_VOCAB_SIZE})")
    if np.isnan(logprobs_NK).any():
        raise NotFiniteError("a top-k log-prob is NaN")
    # a float32 times a power of two is exact
    steps_NK = np.rint(np.clip(logprobs_NK * np.float32(-STEPS_PER_NAT), 0, MAX_STEPS))
    differences_NK = np.diff(steps_NK.astype(np.int32), axis=1, prepend=0)
    if differences_NK.size and differences_NK.min() < 0:
        raise UnsortedError("top-k log-probs must be sorted, likeliest first")
    planes = [ids_NK >> shift for shift in (0, 8, 16)]
    planes += [differences_NK >> shift for shift in (0, 8)]
    return [plane.astype(np.uint8) for plane in planes]  # keeps the lowest byte


def from_planes(planes: Sequence[npt.NDArray[np.uint8]]) -> DecodedLabels:
    """Ids int32[N, K] and log-probs float32[N, K] in nats, in new arrays."""
    ids_NK = _combine(planes[: len(ID_PLANES)])
    steps_NK = _combine(planes[len(ID_PLANES) :])
    np.cumsum(steps_NK, axis=1, out=steps_NK)
    logprobs_NK = empty(steps_NK.shape, np.float32)
    logprobs_NK[...] = steps_NK
    logprobs_NK *= np.float32(-1.0 / STEPS_PER_NAT)
    return ids_NK, logprobs_NK


def _combine(planes: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.int32]:
    """Integers from their bytes, lowest first."""
    low_NK = planes[1].astype(np.uint16)
    low_NK <<= 8
    low_NK |= planes[0]
    values_NK: npt.NDArray[np.int32] = empty(low_NK.shape, np.int32)
    values_NK[...] = low_NK
    for plane_NK in planes[2:]:
        if plane_NK.any():  # ids of most vocabularies fit two bytes
            high_NK = plane_NK.astype(np.int32)
            high_NK <<= 16
            values_NK |= high_NK
    return values_NK


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array in one of Arrow's memory pools.

    Its default pool keeps what is freed: batch after batch in new memory would make decoding a
    third slower. Inside :func:`long_lived` it is that of the system. What stays needs new memory
    anyway, and the default pool takes it in huge pages, which may take longer to clear than the
    labels take to decode.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, buffer=pa.allocate_buffer(num_bytes, memory_pool=_POOL.get()))


_POOL: ContextVar[pa.MemoryPool | None] = ContextVar("pool", default=None)


@contextmanager
def long_lived() -> Iterator[None]:
    """Arrays that :func:`empty` makes in here are kept for long, many at a time."""
    token = _POOL.set(pa.system_memory_pool())
    try:
        yield
    finally:
        _POOL.reset(token)


def plane_fields(width: int) -> list[pa.Field]:
    """Arrow fields of the planes."""
    return [pa.field(name, pa.list_(pa.uint8(), width), nullable=False) for name in PLANES]


def plane_columns(planes: Sequence[npt.NDArray[np.uint8]]) -> list[pa.Array]:
    """Arrow columns of the planes."""
    return [
        pa.FixedSizeListArray.from_arrays(pa.array(plane_NK.ravel()), plane_NK.shape[1])
        for plane_NK in planes
    ]


def plane_bytes(columns: Mapping[str, pa.Array], width: int) -> list[npt.NDArray[np.uint8]]:
    """The planes in Arrow columns, not copied."""
    return [_bytes_of(columns[name]).reshape(-1, width) for name in PLANES]


def _bytes_of(column: pa.Array) -> npt.NDArray[np.uint8]:
    width = column.type.list_size
    items = column.values.slice(column.offset * width, len(column) * width)
    found: npt.NDArray[np.uint8] = items.to_numpy(zero_copy_only=True)
    return found


def check_width(
    ids_NK: npt.NDArray[np.int32], logprobs_NK: npt.NDArray[np.float32], width: int
) -> None:
    """Raise ``BadLabelError`` unless both arrays have ``width`` columns."""
    if not ids_NK.shape == logprobs_NK.shape == (len(ids_NK), width):
        raise BadLabelError(
            f"top-k ids and log-probs must have the shape [N, {width}], got "
            f"{list(ids_NK.shape)} and {list(logprobs_NK.shape)}"
        )
