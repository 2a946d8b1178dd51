"""One of the label sets that a training reads, and what is taken of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from storage.keys import LabelSetSpec, TopKSpec
from storage.label_set import HELD_BYTES, HELD_SHARDS
from storage.samples import LabelledSample
from storage.selection import load_selection_index
from storage.shard_cache import ShardCache
from storage.store import LabelStore
from storage.view import LabelView
from student_train.config import LabelSource
from student_train.errors import PreflightError
from student_train.sidecar_column import read_sidecar_column
from student_train.teacher_rows import SIDECAR
from student_train.weights.config import SidecarWeightConfig, WeightPolicyConfig

Int64s = npt.NDArray[np.int64]

BYTES_PER_TOKEN = 8
"""Of a decoded token of the top-k: its id and its log-prob."""


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
    view: LabelView
    keys: tuple[str, ...]
    """Sample keys, in the order of the selection."""
    num_rows_S: Int64s
    """int64[S]: supervised rows of every sample."""
    num_tokens_S: Int64s
    """int64[S]: prompt and response tokens of every sample."""
    sidecar: Mapping[str, npt.NDArray[np.float32]] | None
    """Column of a sidecar by sample key."""
    only_last_turn: bool
    """Whether rows before the last gap of the label mask are left out."""
    cache: ShardCache | None

    def fork(self) -> "LabelPart":
        """The same with a view of its own, for another thread."""
        return replace(self, view=_open_view(self.store, self.view.spec, self.cache))

    def hold(self, num_shards: int, num_rows: int, max_bytes: int) -> None:
        """Keep so many shards open, and so many rows decoded, within a bound."""
        for found in self.view.sets:
            wanted = num_rows * found.spec.kind.width * BYTES_PER_TOKEN
            found.held_bytes = min(max(wanted, HELD_BYTES), max_bytes)
            found.held_shards = max(num_shards, HELD_SHARDS)

    def read(self, places: Sequence[int]) -> Iterator[LabelledSample]:
        """The samples at these places of the selection, verified."""
        if not places:
            return
        for place, sample in zip(
            places, self.view.read([self.keys[place] for place in places]), strict=True
        ):
            read = sample
            if self.sidecar is not None:
                read = replace(read, optional={**read.optional, SIDECAR: self.sidecar[sample.key]})
            if self.only_last_turn:
                read = _last_rows(read, int(self.num_rows_S[place]))
            yield read


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
    num_rows_S, num_response_tokens_S = view.lengths(selection.sample_keys)
    only_last_turn = supervise == "last_turn"
    if only_last_turn:
        masked_S = selection.num_last_rows_S >= 0
        num_rows_S = np.where(masked_S, selection.num_last_rows_S, num_rows_S)
    sidecar = (
        read_sidecar_column([*view.sets, *view.upgradable], weight, selection.sample_keys)
        if isinstance(weight, SidecarWeightConfig)
        else None
    )
    return LabelPart(
        store,
        view,
        selection.sample_keys,
        num_rows_S,
        selection.num_prompt_tokens_S + num_response_tokens_S,
        sidecar,
        only_last_turn,
        cache,
    )


def _open_view(store: LabelStore, spec: LabelSetSpec, cache: ShardCache | None) -> LabelView:
    view = store.view(spec)
    for found in view.sets:
        found.cache = cache
    return view


def _last_rows(sample: LabelledSample, count: int) -> LabelledSample:
    """A sample with only its last rows."""
    if count == len(sample.positions_N):
        return sample
    last = slice(len(sample.positions_N) - count, None)
    return replace(
        sample,
        positions_N=sample.positions_N[last],
        token_logprob_N=sample.token_logprob_N[last],
        token_rank_N=sample.token_rank_N[last],
        log_tail_mass_N=sample.log_tail_mass_N[last],
        topk_ids_NK=sample.topk_ids_NK[last],
        topk_logprobs_NK=sample.topk_logprobs_NK[last],
        optional={name: values[last] for name, values in sample.optional.items()},
    )
