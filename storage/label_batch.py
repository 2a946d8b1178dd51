"""A record batch of labels as whole columns, and samples as ranges of several batches.

A micro-batch of a student copies ranges of these columns. No array and no object is made for a
sample before, which would take longer than decoding the labels of a short one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.columns import Columns, select_rows
from storage.labels.topk import empty, long_lived
from storage.samples import Float32s, Int32s, LabelledSample

Int64s = npt.NDArray[np.int64]

SLICED_ROWS = 24
"""Rows of a range from which on copying range by range is faster than row by row."""


@dataclass(frozen=True, slots=True)
class LabelBatch:
    """The S samples of a record batch and their N label rows; columns as in `LabelledSample`."""

    rows_S: Int64s
    """int64[S]: of every sample its row in the samples file, ascending."""
    row_ends: Int64s
    """int64[S + 1]: where the label rows of each sample end, and 0 in front."""
    keys: list[str]
    """Of the samples."""
    sample_indices: list[int]
    prompt_ids: Int32s
    """Of all samples, one after the other."""
    prompt_ends: Int64s
    """int64[S + 1]: where each prompt ends, and 0 in front."""
    response_ids: Int32s
    """Of all samples, one after the other."""
    response_ends: Int64s
    """int64[S + 1]: where each response ends, and 0 in front."""
    finish_reasons: list[str]
    stop_reasons: list[str | None]
    token_ids_N: Int32s
    positions_N: Int32s
    token_logprob_N: Float32s
    token_rank_N: Int32s
    log_tail_mass_N: Float32s
    topk_ids_NK: Int32s
    topk_logprobs_NK: Float32s
    optional: Columns

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[int, LabelledSample]]:
        """Every sample with its row in the samples file."""
        for place, row in enumerate(self.rows_S.tolist()):
            yield row, self.sample(place)

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        labels = self.topk_ids_NK.nbytes + self.topk_logprobs_NK.nbytes
        optional = sum(values.nbytes for values in self.optional.values())
        tokens = self.prompt_ids.nbytes + self.response_ids.nbytes
        return 5 * self.token_ids_N.nbytes + labels + optional + tokens

    def sample(self, place: int, num_rows: int | None = None) -> LabelledSample:
        """One of its samples, not copied.

        Args:
            place: Which.
            num_rows: Keep only the last rows; all by default.
        """
        start, stop = self.row_ends[place : place + 2].tolist()
        optional = select_rows(self.optional, slice(start, stop))
        if num_rows is not None and num_rows < stop - start:
            optional = {name: values[-num_rows:] for name, values in optional.items()}
            start = stop - num_rows
        rows = slice(start, stop)
        return LabelledSample(
            key=self.keys[place],
            sample_index=self.sample_indices[place],
            prompt_ids_P=self.prompt_ids[slice(*self.prompt_ends[place : place + 2])],
            response_ids_R=self.response_ids[slice(*self.response_ends[place : place + 2])],
            positions_N=self.positions_N[rows],
            token_logprob_N=self.token_logprob_N[rows],
            token_rank_N=self.token_rank_N[rows],
            log_tail_mass_N=self.log_tail_mass_N[rows],
            topk_ids_NK=self.topk_ids_NK[rows],
            topk_logprobs_NK=self.topk_logprobs_NK[rows],
            optional=optional,
            finish_reason=self.finish_reasons[place],
            stop_reason=self.stop_reasons[place],
        )


def batch_of(sample: LabelledSample) -> LabelBatch:
    """A batch of one sample, not copied."""
    return LabelBatch(
        rows_S=np.zeros(1, np.int64),
        row_ends=_ends(sample.positions_N),
        keys=[sample.key],
        sample_indices=[sample.sample_index],
        prompt_ids=sample.prompt_ids_P,
        prompt_ends=_ends(sample.prompt_ids_P),
        response_ids=sample.response_ids_R,
        response_ends=_ends(sample.response_ids_R),
        finish_reasons=[sample.finish_reason],
        stop_reasons=[sample.stop_reason],
        token_ids_N=sample.token_ids_N,
        positions_N=sample.positions_N,
        token_logprob_N=sample.token_logprob_N,
        token_rank_N=sample.token_rank_N,
        log_tail_mass_N=sample.log_tail_mass_N,
        topk_ids_NK=sample.topk_ids_NK,
        topk_logprobs_NK=sample.topk_logprobs_NK,
        optional=sample.optional,
    )


def _ends(values: npt.NDArray[Any]) -> Int64s:
    return np.array([0, len(values)], dtype=np.int64)


@dataclass(frozen=True)
class Ranges:
    """Ranges of columns of several batches, S of them, that are copied one behind the other."""

    batch_S: Int64s
    """int64[S]: whose column."""
    start_S: Int64s
    """int64[S]: where it begins there."""
    length_S: Int64s
    """int64[S]: how long it is."""

    @cached_property
    def num_values(self) -> int:
        """Of all ranges."""
        return int(self.length_S.sum())

    @cached_property
    def _by_range(self) -> list[tuple[int, int, int]] | None:
        """Batch, start and stop of every range; None where they are too short for that."""
        if self.num_values < SLICED_ROWS * len(self.batch_S):
            return None
        stop_S = self.start_S + self.length_S
        columns = (self.batch_S.tolist(), self.start_S.tolist(), stop_S.tolist())
        return list(zip(*columns, strict=True))

    @cached_property
    def _by_value(self) -> list[tuple[int, Int64s, Int64s]]:
        """Of every batch: from where values are taken, and where they go."""
        from_M = self.spread(self.start_S)
        batch_M = np.repeat(self.batch_S, self.length_S)
        order_M = np.argsort(batch_M, kind="stable")
        batches, firsts = np.unique(batch_M[order_M], return_index=True)
        return [
            (batch, from_M[to], to)
            for batch, to in zip(batches.tolist(), np.split(order_M, firsts[1:]), strict=True)
        ]

    def spread(self, start_S: Int64s) -> Int64s:
        """Where the values belong if each range begins at a place of its own."""
        before_S = np.cumsum(self.length_S) - self.length_S
        places: Int64s = np.repeat(start_S - before_S, self.length_S)
        places += np.arange(self.num_values)
        return places

    def copy(self, columns: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The values of all ranges, one range behind the other.

        Args:
            columns: A column of every batch; all of one shape beyond the first axis.
            dtype: Of the result.
        """
        with long_lived():
            found = empty((self.num_values, *columns[0].shape[1:]), dtype)
        if self.num_values == 0:
            return found
        if self._by_range is not None:
            parts = [columns[batch][start:stop] for batch, start, stop in self._by_range]
            return np.concatenate(parts, out=found)
        for batch, source, target in self._by_value:
            found[target] = columns[batch].take(source, axis=0)
        return found


@dataclass(frozen=True)
class SampleRanges:
    """Samples in an order, as ranges of the batches that hold them."""

    batches: list[LabelBatch]
    batch_S: Int64s
    """int64[S]: in which of them each sample is."""
    place_S: Int64s
    """int64[S]: its place there."""
    num_rows_S: Int64s | None = None
    """int64[S]: how many of its label rows are taken, the last ones; None for all."""

    def __len__(self) -> int:
        return len(self.place_S)

    def samples(self) -> list[LabelledSample]:
        """The samples themselves."""
        chosen = zip(self.batch_S.tolist(), self.place_S.tolist(), strict=True)
        rows = [None] * len(self) if self.num_rows_S is None else self.num_rows_S.tolist()
        return [
            self.batches[batch].sample(place, num_rows)
            for (batch, place), num_rows in zip(chosen, rows, strict=True)
        ]

    @property
    def keys(self) -> list[str]:
        """Sample keys."""
        chosen = zip(self.batch_S.tolist(), self.place_S.tolist(), strict=True)
        return [self.batches[batch].keys[place] for batch, place in chosen]

    @cached_property
    def rows(self) -> Ranges:
        """Label rows."""
        whole = self._ranges(lambda batch: batch.row_ends)
        if self.num_rows_S is None:
            return whole
        start_S = whole.start_S + whole.length_S - self.num_rows_S
        return Ranges(whole.batch_S, start_S, self.num_rows_S)

    @cached_property
    def prompts(self) -> Ranges:
        """Prompt tokens."""
        return self._ranges(lambda batch: batch.prompt_ends)

    @cached_property
    def responses(self) -> Ranges:
        """Response tokens."""
        return self._ranges(lambda batch: batch.response_ends)

    def _ranges(self, ends: Callable[[LabelBatch], Int64s]) -> Ranges:
        columns = [ends(batch) for batch in self.batches]
        first = np.cumsum([0, *map(len, columns)])[:-1]
        together = np.concatenate(columns) if columns else np.zeros(0, np.int64)
        at_S = first[self.batch_S] + self.place_S
        start_S = together[at_S]
        return Ranges(self.batch_S, start_S, together[at_S + 1] - start_S)

    def take(self, order: Int64s) -> "SampleRanges":
        """The samples at these places, in this order."""
        num_rows_S = None if self.num_rows_S is None else self.num_rows_S[order]
        return SampleRanges(self.batches, self.batch_S[order], self.place_S[order], num_rows_S)


def ranges_of(samples: Sequence[LabelledSample]) -> SampleRanges:
    """Samples as ranges of batches of one sample each."""
    count = np.arange(len(samples))
    return SampleRanges([batch_of(sample) for sample in samples], count, np.zeros_like(count))


def join(parts: Sequence[SampleRanges]) -> SampleRanges:
    """The samples of all parts, part after part."""
    if len(parts) == 1:
        return parts[0]
    first = np.cumsum([0, *(len(part.batches) for part in parts)])[:-1]
    rows = [part.rows.length_S if part.num_rows_S is None else part.num_rows_S for part in parts]
    return SampleRanges(
        [batch for part in parts for batch in part.batches],
        np.concatenate([part.batch_S + add for part, add in zip(parts, first, strict=True)]),
        np.concatenate([part.place_S for part in parts]),
        np.concatenate(rows) if any(part.num_rows_S is not None for part in parts) else None,
    )
