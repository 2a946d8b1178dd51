"""One inspected sample: its tokens, and what one or more models say of every labelled position.

Shape legend: N labelled positions, K tokens of a prediction, likeliest first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.inspection.measures import MEASURES
from pipeline.inspection.pieces import Piece, pieces, single
from pipeline.inspection.vocabulary import Vocabulary
from storage.errors import ConfigError
from storage.labels.base import UNUSED_ID
from storage.samples import LabelledSample
from storage.tail import LOG_ZERO

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one model says of the same N positions."""

    name: str
    kind: Literal["labels", "student"]
    values: Mapping[str, Floats]
    """float64[N] by the name of the measure; measures that are not known are missing."""
    topk_ids_NK: npt.NDArray[np.int32]
    """int32[N, K]; UNUSED_ID where a row has fewer."""
    topk_logprobs_NK: Floats
    """float64[N, K], nats."""

    @property
    def argmax_N(self) -> npt.NDArray[np.int32]:
        """int32[N]: the likeliest token."""
        found: npt.NDArray[np.int32] = self.topk_ids_NK[:, 0]
        return found

    def require(self, measure: str) -> Floats:
        """The values of a measure.

        Raises:
            ConfigError: if they are not known for this model.
        """
        if measure not in self.values:
            why = (
                "it compares with the labels: add a student or a second label set"
                if measure == "kl"
                else "the label set does not have this column"
            )
            raise ConfigError(
                f"{self.name} has no {measure}: {why}; known are {', '.join(self.values)}"
            )
        return self.values[measure]


@dataclass(frozen=True, slots=True)
class InspectedSample:
    """A sample with its text and predictions; the first is that of the label set itself."""

    store: str
    label_set: str
    sample: LabelledSample
    vocabulary: Vocabulary
    prompt: Sequence[Piece]
    response: Sequence[Piece]
    predictions: tuple[Prediction, ...]

    @property
    def key(self) -> str:
        """Sample key."""
        return self.sample.key

    @property
    def disagrees_N(self) -> npt.NDArray[np.bool_]:
        """bool[N]: where the models do not have one and the same likeliest token."""
        argmax = np.stack([found.argmax_N for found in self.predictions])
        differs: npt.NDArray[np.bool_] = (argmax != argmax[0]).any(axis=0)
        return differs

    def sql(self, position: int | None = None) -> str:
        """The query of its label rows, or of one; the key is checked hex, so nothing to escape."""
        row = "" if position is None else f" AND position = {position}"
        return f"SELECT * FROM labels WHERE sample_key = '{self.key}'{row}"  # noqa: S608

    def mean(self, measure: str) -> float:
        """Mean of a measure over all positions, of the model that it is most telling of."""
        return float(self.telling(measure).require(measure).mean())

    def telling(self, measure: str) -> Prediction:
        """The prediction to show a measure of: KL is that of the first other model."""
        others = [found for found in self.predictions if measure in found.values]
        return others[0] if others else self.predictions[0]

    def row_of(self, position: int) -> int:
        """Which of the N rows labels a position of the response.

        Raises:
            ConfigError: if none does.
        """
        rows = np.flatnonzero(self.sample.positions_N == position)
        if not len(rows):
            first, last = int(self.sample.positions_N[0]), int(self.sample.positions_N[-1])
            raise ConfigError(
                f"position {position} of sample {self.key} is not labelled; labelled positions "
                f"lie between {first} and {last}"
            )
        return int(rows[0])


def of_labels(sample: LabelledSample, name: str) -> Prediction:
    """What the stored labels of a sample say."""
    log_tail_N = sample.log_tail_mass_N.astype(np.float64)
    values = {
        "tail": np.where(log_tail_N <= LOG_ZERO, 0.0, np.exp(np.minimum(log_tail_N, 0.0))),
        "surprise": np.maximum(-sample.token_logprob_N.astype(np.float64), 0.0),
        "rank": sample.token_rank_N.astype(np.float64),
        "bridge": bridge_scores(sample.topk_logprobs_NK),
    }
    if sample.entropy_N is not None:
        values = {"entropy": sample.entropy_N.astype(np.float64), **values}
    return Prediction(
        name, "labels", values, sample.topk_ids_NK, sample.topk_logprobs_NK.astype(np.float64)
    )


def bridge_scores(topk_logprobs_NK: npt.NDArray[np.floating]) -> Floats:
    r"""float64[N]: the probability of the likeliest token, 1 at a bridge and near 0 at a garden.

    One minus the soft weight :math:`\lambda = 1 - \max_a p(a)` of confidence weights.

    Source: Bridge-Garden (ICML 2026), confidence weights (``docs/weights.md``).
    """
    # stored log-probs are rounded, and a rounded zero must not become a probability above one
    scores: Floats = np.exp(np.minimum(topk_logprobs_NK[:, 0].astype(np.float64), 0.0))
    return scores


def inspect_sample(
    sample: LabelledSample,
    vocabulary: Vocabulary,
    *,
    store: str,
    label_set: str,
    others: Sequence[Prediction] = (),
) -> InspectedSample:
    """A sample with its text, its own labels and the predictions of other models."""
    return InspectedSample(
        store=store,
        label_set=label_set,
        sample=sample,
        vocabulary=vocabulary,
        prompt=pieces(sample.prompt_ids_P.tolist(), vocabulary),
        response=pieces(sample.response_ids_R.tolist(), vocabulary),
        predictions=(of_labels(sample, "labels"), *others),
    )


def describe(inspected: InspectedSample, *, top: int) -> dict[str, Any]:
    """Everything about a sample as plain data, for JSON and for the page.

    Args:
        inspected: The sample.
        top: Candidates per position and model, at most.
    """
    sample = inspected.sample
    used = {
        int(token) for p in inspected.predictions for token in np.unique(p.topk_ids_NK[:, :top])
    }
    used |= {int(token) for p in inspected.predictions for token in p.argmax_N}
    return {
        "store": inspected.store,
        "label_set": inspected.label_set,
        "sample_key": sample.key,
        "prompt_key": sample.prompt_key,
        "sample_index": sample.sample_index,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "sql": inspected.sql(),
        "prompt": [_piece(piece) for piece in inspected.prompt],
        "response": [_piece(piece) for piece in inspected.response],
        "positions": sample.positions_N.tolist(),
        "disagrees": inspected.disagrees_N.tolist(),
        "models": [_prediction(found, top) for found in inspected.predictions],
        "tokens": {
            str(token): _piece(single(token, inspected.vocabulary))
            for token in sorted(used - {UNUSED_ID})
        },
    }


def _piece(piece: Piece) -> dict[str, Any]:
    described: dict[str, Any] = {"id": piece.token_id, "text": piece.text}
    if piece.kind != "text":
        described["kind"] = piece.kind
    if piece.joined is not None:
        described["joined"] = piece.joined
    return described


def _prediction(found: Prediction, top: int) -> dict[str, Any]:
    ids_NK, logprobs_NK = found.topk_ids_NK[:, :top], found.topk_logprobs_NK[:, :top]
    used_NK = ids_NK != UNUSED_ID
    return {
        "name": found.name,
        "kind": found.kind,
        "values": {
            name: [round(float(value), 6) for value in found.values[name]]
            for name in MEASURES
            if name in found.values
        },
        "argmax": found.argmax_N.tolist(),
        "top_ids": [row[kept].tolist() for row, kept in zip(ids_NK, used_NK, strict=True)],
        "top_logprobs": [
            np.round(row[kept], 4).tolist() for row, kept in zip(logprobs_NK, used_NK, strict=True)
        ],
    }
