"""From cached samples to the micro-batches that go through a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.keys import LabelSetSpec
from storage.samples import LabelledSample
from storage.shard import BATCH_ROWS
from storage.shard_cache import ShardCache
from storage.store import LabelStore
from student_train.config import LabelSource, LoaderConfig, TrainDataConfig
from student_train.hard.config import HardLabel
from student_train.label_part import common_spec, load_part
from student_train.losses.base import TeacherRows
from student_train.teacher_rows import teacher_rows
from student_train.weights.config import WeightPolicyConfig

Int64s = npt.NDArray[np.int64]

BATCHES_PER_LANE = 2
"""Record batches that the window of a lane lies in, as a rule."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples that go through the model at once, and the labels of their supervised positions."""

    input_ids_BT: Tensor
    """int64[B, T], right-padded with 0."""
    attention_mask_BT: Tensor
    """int64[B, T], 1 on real tokens."""
    rows_M: Tensor
    """int64[M]: flat index b * T + t of the hidden state that predicts each labelled token."""
    labels: TeacherRows
    """Labels of the same M positions."""
    document_ends: tuple[int, ...] | None = None
    """Where each document of a packed row ends, the last at T; None where every row is one."""
    counts: bool = True
    """False for a batch that a rank computes and does not count, while others have more to do.

    It is a real one: ZeRO reduces gradients in the order in which a backward pass makes them, and
    that must be the same on all ranks."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on another device."""
        return MicroBatch(
            self.input_ids_BT.to(device),
            self.attention_mask_BT.to(device),
            self.rows_M.to(device),
            self.labels.to(device),
            self.document_ends,
            self.counts,
        )


class LabelReader:
    """The samples of one selection or of a mixture of several, read from the cache and verified.

    They may lie in any label set that satisfies the one that is named. In memory are some numbers
    per sample, and a bounded number of decoded batches.

    Args:
        source: Which labels.
        weight: The policy that they are read for; its sidecar is read too.
        mixture: More labels, numbered on behind the first ones.
        data: How many tokens per position are read, and which positions.
        loader: Where copies of remote shards are kept.

    Raises:
        NotLabelledError: if no set, or the sidecar, has some sample of the selection.
        PreflightError: if the sidecar does not serve, or labels do not mix.
    """

    def __init__(
        self,
        source: LabelSource,
        weight: WeightPolicyConfig | None = None,
        *,
        mixture: Sequence[LabelSource] = (),
        data: TrainDataConfig | None = None,
        loader: LoaderConfig | None = None,
    ) -> None:
        data, loader = data or TrainDataConfig(), loader or LoaderConfig()
        sources = (source, *mixture)
        specs = [LabelStore(part.store).open(part.label_set).spec for part in sources]
        self.spec: LabelSetSpec = common_spec(specs, data.k)
        """What is read of every sample."""
        self._cache = (
            None
            if loader.cache_directory is None
            else ShardCache(Path(loader.cache_directory), int(loader.cache_gib * 2**30))
        )
        self._parts = [
            load_part(part, self.spec, spec, weight, data.supervise, self._cache)
            for part, spec in zip(sources, specs, strict=True)
        ]
        self.weights = [part.weight for part in sources]
        """Passes over every source per epoch."""
        self._first = [0, *accumulate(len(part.keys) for part in self._parts)]
        self.source_S: Int64s = np.repeat(
            np.arange(len(self._parts)), [len(part.keys) for part in self._parts]
        )
        """int64[S]: which source every sample comes from."""
        self.num_rows: Int64s = np.concatenate([part.num_rows_S for part in self._parts])
        """int64[S]: supervised rows of every sample."""
        self.num_tokens: Int64s = np.concatenate([part.num_tokens_S for part in self._parts])
        """int64[S]: prompt plus response tokens of every sample."""
        # bytes compare like the keys, which are hexadecimal, and take an eighth of the memory
        keys_S = np.array([key.encode() for part in self._parts for key in part.keys])
        self.key_order_S: Int64s = np.argsort(keys_S, kind="stable")
        """int64[S]: all samples, sorted by their keys."""

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return self._first[-1]

    @property
    def vocab_size(self) -> int:
        """Effective vocabulary of the labels."""
        return self.spec.vocab_size

    def fork(self) -> "LabelReader":
        """A reader of the same samples for another thread."""
        twin = object.__new__(LabelReader)
        twin.__dict__.update(self.__dict__)
        twin._parts = [part.fork() for part in self._parts]
        return twin

    def hold(self, lanes: int, max_bytes: int) -> None:
        """Keep decoded what so many lanes are reading, within a bound."""
        for part in self._parts:
            share = max_bytes // len(self._parts)
            part.hold(BATCHES_PER_LANE * lanes, BATCH_ROWS * BATCHES_PER_LANE * lanes, share)

    def read(self, indices: Sequence[int]) -> list[LabelledSample]:
        """The samples at these places of the selection, verified.

        Raises:
            ShardCorruptError: if the bytes differ from what was committed.
        """
        sources = self.source_S[list(indices)].tolist()
        places: list[list[int]] = [[] for _ in self._parts]
        for index, source in zip(indices, sources, strict=True):
            places[source].append(index - self._first[source])
        streams = [part.read(mine) for part, mine in zip(self._parts, places, strict=True)]
        return [next(streams[source]) for source in sources]


def collate(
    samples: Sequence[LabelledSample], hard: HardLabel, spec: LabelSetSpec, *, packed: bool = False
) -> MicroBatch:
    """Put samples into one micro-batch, below or behind one another.

    Row n of a sample's labels belongs to the hidden state at ``len(prompt) + position - 1``: the
    one that predicts response token ``position``. The last token of a sample predicts nothing and
    is left out, so no row of one sample predicts a token of the next.

    Args:
        samples: At least one.
        hard: Which token is the hard label.
        spec: Of the samples' label set.
        packed: One row of all samples, instead of padding each to the longest.
    """
    lengths = [len(s.prompt_ids_P) + len(s.response_ids_R) - 1 for s in samples]
    ends = list(accumulate(lengths))
    width = ends[-1] if packed else max(lengths)
    input_ids = np.zeros((1 if packed else len(samples), width), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    rows = []
    for number, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        tokens = np.concatenate([sample.prompt_ids_P, sample.response_ids_R])
        start = ends[number] - length if packed else number * width
        input_ids.reshape(-1)[start : start + length] = tokens[:length]
        mask.reshape(-1)[start : start + length] = 1
        rows.append(start + len(sample.prompt_ids_P) - 1 + sample.positions_N)
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(mask),
        torch.from_numpy(np.concatenate(rows).astype(np.int64)),
        teacher_rows(samples, hard, spec),
        tuple(ends) if packed else None,
    )
