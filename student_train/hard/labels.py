"""Which token is the hard label of a row."""

import hashlib

import numpy as np
import numpy.typing as npt

from storage.label_batch import SampleRanges
from student_train.hard.config import HardLabel


def hard_labels(
    samples: SampleRanges, hard: HardLabel, *, vocab_size: int
) -> npt.NDArray[np.int64]:
    """Hard label of every label row of some samples, int64[M].

    ``sampled`` and ``dataset`` are the response token, which the teacher drew or which was given;
    ``argmax`` is the first stored token; ``random`` is a control.
    """
    if hard == "random":
        positions_M = samples.rows.copy([b.positions_N for b in samples.batches], np.int64)
        parts = np.split(positions_M, np.cumsum(samples.rows.length_S)[:-1])
        pairs = zip(samples.keys, parts, strict=True)
        return np.concatenate([random_tokens(*pair, vocab_size=vocab_size) for pair in pairs])
    if hard == "argmax":
        return samples.rows.copy([b.topk_ids_NK[:, 0] for b in samples.batches], np.int64)
    return samples.rows.copy([b.token_ids_N for b in samples.batches], np.int64)


def random_tokens(
    key: str, positions_N: npt.NDArray[np.integer], *, vocab_size: int
) -> npt.NDArray[np.int64]:
    """Uniform tokens, int64[N]: a pure function of sample key and position.

    They are the same in every batch, epoch, world size and after a restart.

    Args:
        key: Sample key.
        positions_N: int[N], response-relative, increasing, not empty.
        vocab_size: Effective vocabulary.

    Source: ``random_label`` of the Bridge-Garden release, which draws anew at every step.
    """
    digest = hashlib.sha256(f"distillcache random label\0{key}".encode()).digest()
    # raw numbers of a counter-based generator: their stream never changes between versions
    raw_R = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(
        int(positions_N[-1]) + 1
    )
    uniform_N = (raw_R[positions_N] >> np.uint64(11)).astype(np.float64) * 2.0**-53
    tokens_N: npt.NDArray[np.int64] = (uniform_N * vocab_size).astype(np.int64)
    return tokens_N
