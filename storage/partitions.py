"""Partitions: label sets are cut by the leading bits of their sample keys.

A sample key begins like its prompt key, so the samples of a prompt share a partition. Partitions
keep what is near in key order near on disk; ``compact`` doubles them as a set grows.
"""

import math

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
"""Sample keys, uint64[N, 2]: the high and the low half of each."""

MAX_PARTITION_BITS = 16
PARTITION_TOKENS = 2**20
"""Aim for the response tokens of a partition when a set is created."""
MIN_SHARD_TOKENS = 50_000
"""A commit is not cut into shards smaller than about this."""


def partition_bits(num_tokens: int) -> int:
    """log2 of the number of partitions for a set of ``num_tokens`` response tokens."""
    return _bits(num_tokens / PARTITION_TOKENS)


def shard_bits(num_tokens: int, bits: int) -> int:
    """Leading bits by which a commit of ``num_tokens`` is cut: at most those of the partitions."""
    return min(bits, _bits(num_tokens / MIN_SHARD_TOKENS))


def _bits(parts: float) -> int:
    return min(MAX_PARTITION_BITS, max(0, math.floor(math.log2(max(parts, 1)))))


def leading_bits(keys: Keys, bits: int) -> npt.NDArray[np.int64]:
    """The number that the first ``bits`` bits of every key make, int64[N]."""
    if bits == 0:
        return np.zeros(len(keys), dtype=np.int64)
    return (keys[:, 0] >> np.uint64(64 - bits)).astype(np.int64)


def common_partition(keys: Keys, bits: int) -> str:
    """Bits, at most ``bits``, that all keys begin with, as text such as ``0110``."""
    low, high = (int(value) for value in (keys[:, 0].min(), keys[:, 0].max()))
    shared = min(bits, 64 - (low ^ high).bit_length())
    return format(low >> (64 - shared), f"0{shared}b") if shared else ""
