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
from storage.label_batch import Ranges, SampleRanges, join, ranges_of
from storage.samples import LabelledSample
from storage.shard_cache import ShardCache
from storage.store import LabelStore
from student_train.config import LabelSource, LoaderConfig, TrainDataConfig
from student_train.hard.config import HardLabel
from student_train.losses.base import TeacherRows
from student_train.streaming.label_part import common_spec, load_part
from student_train.streaming.teacher_rows import teacher_rows
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
        self._first = [0, *accumulate(len(part.located) for part in self._parts)]
        self.source_S: Int64s = np.repeat(
            np.arange(len(self._parts)), [len(part.located) for part in self._parts]
        )
        """int64[S]: which source every sample comes from."""
        self.num_rows: Int64s = _joined([part.num_rows_S for part in self._parts])
        """int64[S]: supervised rows of every sample."""
        self.num_tokens: Int64s = _joined([part.num_tokens_S for part in self._parts])
        """int64[S]: prompt plus response tokens of every sample."""
        keys_S2 = np.concatenate([part.located.keys for part in self._parts])
        self.key_order_S: Int64s = np.lexsort((keys_S2[:, 1], keys_S2[:, 0]))
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
            part.hold(BATCHES_PER_LANE * lanes, max_bytes // len(self._parts))

    def read(self, indices: Sequence[int]) -> list[LabelledSample]:
        """The samples at these places of the selection, verified.

        Raises:
            ShardCorruptError: if the bytes differ from what was committed.
        """
        return self.ranges(indices).samples() if len(indices) else []

    def ranges(self, indices: Sequence[int]) -> SampleRanges:
        """As :meth:`read`, but where they lie in decoded batches, which is much faster."""
        chosen = np.asarray(indices, dtype=np.int64)
        source = self.source_S[chosen]
        parts, order = [], []
        for number in np.unique(source).tolist():
            mine = np.flatnonzero(source == number)
            places = (chosen[mine] - self._first[number]).tolist()
            parts.append(self._parts[number].ranges(places))
            order.append(mine)
        return join(parts).take(np.argsort(np.concatenate(order)))


def _joined(parts: Sequence[Int64s]) -> Int64s:
    """All parts, not copied where there is one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def collate(
    samples: Sequence[LabelledSample] | SampleRanges,
    hard: HardLabel,
    spec: LabelSetSpec,
    *,
    packed: bool = False,
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
    found = samples if isinstance(samples, SampleRanges) else ranges_of(samples)
    prompt_S, response_S = found.prompts.length_S, found.responses.length_S
    length_S = prompt_S + response_S - 1
    ends_S = np.cumsum(length_S)
    width = int(ends_S[-1] if packed else length_S.max())
    num_rows = 1 if packed else len(found)
    start_S = ends_S - length_S if packed else np.arange(len(found)) * width
    input_ids, mask = np.zeros((2, num_rows * width), dtype=np.int64)
    # all but the last token of every response; one range of length_S - prompt_S behind each prompt
    heads = Ranges(found.batch_S, found.responses.start_S, response_S - 1)
    for ranges, at_S, columns in (
        (found.prompts, start_S, [batch.prompt_ids for batch in found.batches]),
        (heads, start_S + prompt_S, [batch.response_ids for batch in found.batches]),
    ):
        places = ranges.spread(at_S)
        input_ids[places] = ranges.copy(columns, np.int64)
        mask[places] = 1
    rows_M = np.repeat(start_S + prompt_S - 1, found.rows.length_S)
    rows_M += found.rows.copy([batch.positions_N for batch in found.batches], np.int64)
    return MicroBatch(
        torch.from_numpy(input_ids.reshape(num_rows, width)),
        torch.from_numpy(mask.reshape(num_rows, width)),
        torch.from_numpy(rows_M),
        teacher_rows(found, hard, spec),
        tuple(ends_S.tolist()) if packed else None,
    )
