"""One of the label sets that a training reads, and what is taken of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from storage.index import parse_keys
from storage.keys import LabelSetSpec, TopKSpec
from storage.label_batch import LabelBatch, SampleRanges
from storage.label_set import HELD_BYTES
from storage.located import LocatedSamples
from storage.selection import load_selection_index
from storage.shard import BATCH_ROWS, SAMPLES_BATCH_ROWS
from storage.shard_cache import ShardCache
from storage.store import LabelStore
from storage.view import LabelView
from student_train.config import LabelSource
from student_train.errors import PreflightError
from student_train.streaming.sidecar_column import read_sidecar_column
from student_train.streaming.teacher_rows import SIDECAR
from student_train.weights.config import SidecarWeightConfig, WeightPolicyConfig

Int64s = npt.NDArray[np.int64]

BYTES_PER_TOKEN = 8
"""Of a decoded token of the top-k: its id and its log-prob."""

BYTES_PER_ROW = 64
"""Of the other columns of a decoded row; some more where optional columns are read."""


def common_spec(specs: Sequence[LabelSetSpec], k: int | None) -> LabelSetSpec:
    """What can be read of all label sets alike: the spec of the first, with what all of them hold.

    Args:
        specs: At least one.
        k: Tokens per position, None for as many as all of them have.

    Raises:
        PreflightError: if vocabularies differ, or one has fewer tokens per position.
    """
    first = specs[0]
    for spec in specs[1:]:
        if spec.vocab_size != first.vocab_size:
            raise PreflightError(
                f"label set {spec.key} has a vocabulary of {spec.vocab_size}, {first.key} one of "
                f"{first.vocab_size}; only labels of one tokenizer can be mixed"
            )
    if len(specs) == 1 and k is None:
        return first
    fixed = [spec for spec in specs if isinstance(spec.kind, TopKSpec)]
    if len(fixed) < len(specs):
        raise PreflightError(
            "train.data.k and train.data.mixture need labels of kind topk, one of the label sets "
            "keeps a varying number of tokens per position"
        )
    poorest = min(fixed, key=lambda spec: spec.kind.width)
    wanted = poorest.kind.width if k is None else k
    if wanted > poorest.kind.width:
        raise PreflightError(
            f"train.data.k is {wanted}, label set {poorest.key} holds {poorest.kind.width} tokens "
            "per position; lower it, or label again with a larger label.kind.k"
        )
    columns = [c for c in first.columns if all(c in spec.columns for spec in specs)]
    if wanted < first.kind.width:  # samples of the tail serve no smaller head, except for counts
        columns = [c for c in columns if isinstance(c, str) or c.type == "counts"]
    kind = first.kind.model_copy(update={"k": wanted})
    return first.model_copy(update={"kind": kind, "columns": tuple(columns)})


def _as_common(spec: LabelSetSpec, common: LabelSetSpec) -> LabelSetSpec:
    """The request to one label set for what is read of all."""
    return spec.model_copy(update={"kind": common.kind, "columns": common.columns})


@dataclass(frozen=True, slots=True)
class LabelPart:
    """A selection, and the view of the label sets that serve it."""

    store: LabelStore
    located: LocatedSamples
    """The samples, in the order of the selection."""
    num_rows_S: Int64s
    """int64[S]: supervised rows of every sample."""
    num_tokens_S: Int64s
    """int64[S]: prompt and response tokens of every sample."""
    only_last_turn: bool
    """Whether rows before the last gap of the label mask are left out."""
    cache: ShardCache | None

    def fork(self) -> "LabelPart":
        """The same with a view of its own, for another thread."""
        view = _open_view(self.store, self.located.view.spec, self.cache)
        return replace(self, located=self.located.fork(view))

    def hold(self, num_batches: int, max_bytes: int) -> None:
        """Keep so many record batches open and decoded, within a bound."""
        width = max((found.spec.kind.width for found in self.located.view.sets), default=0)
        of_labels = BATCH_ROWS * (width * BYTES_PER_TOKEN + BYTES_PER_ROW)
        prompt_tokens = self.num_tokens_S.mean() if len(self.num_tokens_S) else 0
        of_samples = int(SAMPLES_BATCH_ROWS * prompt_tokens * np.dtype(np.int32).itemsize)
        wanted = max(num_batches * (of_labels + of_samples), HELD_BYTES)
        self.located.hold(num_batches, min(wanted, max_bytes))

    def ranges(self, places: Sequence[int]) -> SampleRanges:
        """The samples at these places of the selection, verified."""
        found = self.located.ranges(places)
        if self.only_last_turn:
            return replace(found, num_rows_S=self.num_rows_S[list(places)])
        return found


def load_part(
    source: LabelSource,
    common: LabelSetSpec,
    spec: LabelSetSpec,
    weight: WeightPolicyConfig | None,
    supervise: str,
    cache: ShardCache | None,
) -> LabelPart:
    """Load a selection and find the label sets that serve it.

    Args:
        source: Which labels.
        common: What is read of all labels.
        spec: Of this label set.
        weight: The policy that they are read for.
        supervise: Which positions, as in ``train.data``.
        cache: Where copies of remote shards are kept.

    Raises:
        NotLabelledError: if a sample is not stored.
        PreflightError: if the sidecar does not serve.
    """
    store = LabelStore(source.store)
    selection = load_selection_index(store.objects, source.selection)
    # the whole request of the set where it is read whole: then nothing is narrowed
    wanted = spec if spec.kind == common.kind and spec.columns == common.columns else None
    view = _open_view(store, wanted or _as_common(spec, common), cache)
    keys = parse_keys(selection.sample_keys)
    if isinstance(weight, SidecarWeightConfig):
        sets = [*view.sets, *view.upgradable]
        sidecar = read_sidecar_column(sets, weight, selection.sample_keys)
        located = LocatedSamples(view, keys, prepare=partial(_with_sidecar, sidecar=sidecar))
    else:
        located = LocatedSamples(view, keys)
    num_rows_S = located.num_rows_S
    only_last_turn = supervise == "last_turn"
    if only_last_turn:
        masked_S = selection.num_last_rows_S >= 0
        num_rows_S = np.where(masked_S, selection.num_last_rows_S, num_rows_S)
    return LabelPart(
        store,
        located,
        num_rows_S,
        selection.num_prompt_tokens_S + located.num_tokens_S,
        only_last_turn,
        cache,
    )


def _open_view(store: LabelStore, spec: LabelSetSpec, cache: ShardCache | None) -> LabelView:
    view = store.view(spec)
    for found in view.sets:
        found.cache = cache
    return view


def _with_sidecar(batch: LabelBatch, sidecar: Mapping[str, npt.NDArray[np.float32]]) -> LabelBatch:
    """A batch with the column of a sidecar; NaN for samples that are not of the selection."""
    column_N = np.full(len(batch.positions_N), np.nan, dtype=np.float32)
    ends = batch.row_ends.tolist()
    for key, start, stop in zip(batch.keys, ends[:-1], ends[1:], strict=True):
        if key in sidecar:
            column_N[start:stop] = sidecar[key]
    return replace(batch, optional={**batch.optional, SIDECAR: column_N})
