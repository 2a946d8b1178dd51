"""From cached samples to padded micro-batches.

The order of samples and their grouping into optimiser steps and micro-batches is a function of
(seed, epoch, selection) alone: the same for every world size. Ranks take micro-batches in turn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from storage.keys import LabelSetSpec
from storage.samples import LabelledSample
from storage.selection import Selection, load_selection
from storage.store import LabelStore
from student_train.config import BatchConfig, LabelSource
from student_train.hard.config import HardLabel
from student_train.losses.base import TeacherRows
from student_train.sidecar_column import read_sidecar_column
from student_train.teacher_rows import SIDECAR, teacher_rows
from student_train.weights.config import SidecarWeightConfig, WeightPolicyConfig


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One optimiser step."""

    micro_batches: tuple[tuple[int, ...], ...]
    """Indices into the selection, micro-batch by micro-batch."""
    num_supervised: int
    """Label rows of the whole step over all ranks: the one normaliser of its loss."""
    num_tokens: int
    """Prompt and response tokens of the step, padding excluded."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Padded samples and the labels of their supervised positions."""

    input_ids_BT: Tensor
    """int64[B, T], right-padded with 0."""
    attention_mask_BT: Tensor
    """int64[B, T], 1 on real tokens."""
    rows_M: Tensor
    """int64[M]: flat index b * T + t of the hidden state that predicts each labelled token."""
    labels: TeacherRows
    """Labels of the same M positions."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on another device."""
        return MicroBatch(
            self.input_ids_BT.to(device),
            self.attention_mask_BT.to(device),
            self.rows_M.to(device),
            self.labels.to(device),
        )


class LabelReader:
    """The samples of one selection, read from the cache and verified.

    They may lie in any label set that satisfies the one that is named.

    Args:
        source: Which labels.
        weight: The policy that they are read for; its sidecar is read too.

    Raises:
        NotLabelledError: if no set, or the sidecar, has some sample of the selection.
        PreflightError: if the sidecar does not serve.
    """

    def __init__(self, source: LabelSource, weight: WeightPolicyConfig | None = None) -> None:
        store = LabelStore(source.store)
        self.spec: LabelSetSpec = store.open(source.label_set).spec
        self.selection: Selection = load_selection(store.objects, source.selection)
        self._view = store.view(self.spec)
        self._keys = self.selection.sample_keys
        self.num_rows, num_response_tokens = self._view.lengths(self._keys)
        """int64[S]: label rows of every sample of the selection."""
        prompt_lengths = [len(request.prompt_ids_P) for request in self.selection.requests]
        self.num_tokens = np.array(prompt_lengths, dtype=np.int64) + num_response_tokens
        """int64[S]: prompt plus response tokens of every sample."""
        self._sidecar = (
            read_sidecar_column([*self._view.sets, *self._view.upgradable], weight, self._keys)
            if isinstance(weight, SidecarWeightConfig)
            else None
        )

    @property
    def vocab_size(self) -> int:
        """Effective vocabulary of the labels."""
        return self.spec.vocab_size

    def read(self, indices: Sequence[int]) -> list[LabelledSample]:
        """The samples at these places of the selection, verified."""
        samples = self._view.read([self._keys[index] for index in indices])
        if self._sidecar is None:
            return list(samples)
        return [
            replace(sample, optional={**sample.optional, SIDECAR: self._sidecar[sample.key]})
            for sample in samples
        ]


def plan_epoch(
    num_rows_S: np.ndarray, num_tokens_S: np.ndarray, batch: BatchConfig, *, seed: int, epoch: int
) -> list[StepPlan]:
    """Group shuffled samples into steps of about ``batch.tokens`` tokens.

    A step ends before the sample that would exceed the budget, so no sample is split, dropped or
    seen twice in an epoch; a sample longer than the budget gets a step of its own.
    """
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(num_tokens_S))
    groups: list[list[int]] = [[]]
    used = 0
    for index in order.tolist():
        if groups[-1] and used + num_tokens_S[index] > batch.tokens:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += int(num_tokens_S[index])
    return [_plan_step(group, num_rows_S, num_tokens_S, batch) for group in groups if group]


def _plan_step(
    group: list[int], num_rows_S: np.ndarray, num_tokens_S: np.ndarray, batch: BatchConfig
) -> StepPlan:
    return StepPlan(
        micro_batches=tuple(split_by_padded_size(group, num_tokens_S, batch.micro_tokens)),
        num_supervised=int(num_rows_S[group].sum()),
        num_tokens=int(num_tokens_S[group].sum()),
    )


def split_by_padded_size(
    indices: Sequence[int], num_tokens_S: np.ndarray, micro_tokens: int
) -> Iterator[tuple[int, ...]]:
    """Micro-batches of samples of like length whose padded size stays within ``micro_tokens``."""
    by_length = sorted(indices, key=lambda index: (-int(num_tokens_S[index]), index))
    current: list[int] = []
    for index in by_length:
        longest = int(num_tokens_S[current[0]]) if current else 0
        if current and longest * (len(current) + 1) > micro_tokens:
            yield tuple(current)
            current = []
        current.append(index)
    if current:
        yield tuple(current)


def collate(samples: Sequence[LabelledSample], hard: HardLabel, spec: LabelSetSpec) -> MicroBatch:
    """Pad samples into one micro-batch.

    Row n of a sample's labels belongs to the hidden state at ``len(prompt) + position - 1``: the
    one that predicts response token ``position``.

    Args:
        samples: At least one.
        hard: Which token is the hard label.
        spec: Of the samples' label set.
    """
    lengths = [len(s.prompt_ids_P) + len(s.response_ids_R) - 1 for s in samples]
    width = max(lengths)
    input_ids = np.zeros((len(samples), width), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    rows = []
    for number, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        tokens = np.concatenate([sample.prompt_ids_P, sample.response_ids_R])
        input_ids[number, :length] = tokens[:length]  # the last token predicts nothing
        mask[number, :length] = 1
        rows.append(number * width + len(sample.prompt_ids_P) - 1 + sample.positions_N)
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(mask),
        torch.from_numpy(np.concatenate(rows).astype(np.int64)),
        teacher_rows(samples, hard, spec),
    )
