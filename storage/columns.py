"""Optional label columns: what a request stores beside the mandatory ones, and how it is checked.

In memory they are arrays by the name of their Arrow column. Scalars are float32[N]. Tail samples
are two rectangles, ``tail_ids`` int32[N, M] and ``tail_weights`` float32[N, M]: in every row the
ids ascend, and unused entries (id -1, weight 0) stand last. On disk these are lists without the
unused entries. ``docs/format.md`` section 4.4 is the specification.

To add a scalar, add a name to ``ColumnName`` in ``storage/keys.py``, a line to ``SCALARS``, its
arithmetic to ``storage/dense.py`` and a row to the format.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.checks import MASS_TOLERANCE, require_rows
from storage.errors import BadLabelError, MassError, NotFiniteError, UnsortedError, VocabularyError
from storage.keys import (
    ColumnSpec,
    CountsSpec,
    LabelSetSpec,
    TailSampleSpec,
    ThresholdSpec,
)
from storage.labels.base import UNUSED_ID
from storage.labels.topk import MAX_VOCAB_SIZE

Columns = Mapping[str, npt.NDArray[Any]]

POWERS: Final = {"10": 0.1, "25": 0.25, "50": 0.5, "75": 0.75, "200": 2.0, "400": 4.0}
"""Exponents alpha of the power sums by how their columns are named."""

LOG_POWER_SUM: Final = "log_power_sum_"
POWER_SLOPE: Final = "power_slope_"
"""Slopes are stored of exponents below 1 only: there temperatures between two are interpolated."""

SCALARS: Final[dict[str, tuple[str, ...]]] = {
    "entropy": ("entropy",),
    "power_sum_10": (LOG_POWER_SUM + "10",),
    "power_sum_200": (LOG_POWER_SUM + "200",),
    "power_sum_400": (LOG_POWER_SUM + "400",),
    "power_sums": tuple(
        prefix + power for prefix in (LOG_POWER_SUM, POWER_SLOPE) for power in ("25", "50", "75")
    ),
}
"""Scalar Arrow columns of every name in a request, in their order in the file."""

TAIL_IDS: Final = "tail_ids"
TAIL_WEIGHTS: Final = "tail_weights"

POWER_TOLERANCE_NATS: Final = 0.02
"""Power sums may leave their bounds by this much: engines add up a vocabulary in float32."""


def exponent(column: str) -> float:
    """The alpha of an Arrow column that holds a power sum or its slope."""
    return POWERS[column.rpartition("_")[2]]


def scalar_columns(columns: Iterable[ColumnSpec]) -> list[str]:
    """Names of the float32 Arrow columns that hold some optional columns."""
    return [name for column in columns if isinstance(column, str) for name in SCALARS[column]]


def arrow_columns(spec: LabelSetSpec) -> list[str]:
    """Names of all Arrow columns that hold the optional columns of a request, in order."""
    lists = [] if spec.tail_samples is None else [TAIL_IDS, TAIL_WEIGHTS]
    return scalar_columns(spec.columns) + lists


def column_fields(spec: LabelSetSpec) -> list[pa.Field]:
    """Arrow fields of the optional columns of a request, none nullable."""
    kinds = {TAIL_IDS: pa.list_(pa.int32()), TAIL_WEIGHTS: pa.list_(pa.float32())}
    return [
        pa.field(name, kinds.get(name, pa.float32()), nullable=False)
        for name in arrow_columns(spec)
    ]


def select_rows(optional: Columns, rows: Any) -> dict[str, npt.NDArray[Any]]:
    """Optional columns of some rows; tail samples become as wide as the widest of these rows.

    Args:
        optional: Columns of N rows.
        rows: Anything that indexes the first axis and leaves it an axis.
    """
    selected = {name: values[rows] for name, values in optional.items()}
    if TAIL_IDS in selected:
        width = int((selected[TAIL_IDS] != UNUSED_ID).sum(axis=1).max(initial=0))
        for name in (TAIL_IDS, TAIL_WEIGHTS):
            selected[name] = selected[name][:, :width]
    return selected


# -- Arrow -----------------------------------------------------------------------------------------
def encode_columns(optionals: Sequence[Columns], spec: LabelSetSpec) -> list[pa.Array]:
    """Arrow columns of the checked optional columns of several samples, in order."""
    encoded = [
        pa.array(np.concatenate([optional[name] for optional in optionals]))
        for name in scalar_columns(spec.columns)
    ]
    if spec.tail_samples is not None:
        used = [optional[TAIL_IDS] != UNUSED_ID for optional in optionals]
        lengths = np.concatenate([used_NM.sum(axis=1) for used_NM in used])
        offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
        for name in (TAIL_IDS, TAIL_WEIGHTS):
            kept = [o[name][used_NM] for o, used_NM in zip(optionals, used, strict=True)]
            encoded.append(pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(kept))))
    return encoded


def decode_columns(
    columns: Mapping[str, pa.Array], spec: LabelSetSpec, *, name: str
) -> dict[str, npt.NDArray[Any]]:
    """Optional columns of N rows out of verified Arrow columns.

    Raises:
        BadLabelError: if the lists of tail samples differ in length or are too long.
    """
    optional = {column: columns[column].to_numpy() for column in scalar_columns(spec.columns)}
    if spec.tail_samples is not None:
        optional |= _rectangles(columns, spec.tail_samples, name)
    return optional


def _rectangles(
    columns: Mapping[str, pa.Array], spec: TailSampleSpec, name: str
) -> dict[str, npt.NDArray[Any]]:
    ids, weights = columns[TAIL_IDS], columns[TAIL_WEIGHTS]
    lengths_N = np.diff(ids.offsets.to_numpy())
    if not np.array_equal(lengths_N, np.diff(weights.offsets.to_numpy())):
        raise BadLabelError(f"{name}: tail_ids and tail_weights have lists of different lengths")
    # before memory is taken for a rectangle as wide as the longest list
    _require_width(lengths_N, spec, name)
    used_NM = np.arange(lengths_N.max(initial=0)) < lengths_N[:, None]
    ids_NM = np.full(used_NM.shape, UNUSED_ID, np.int32)
    weights_NM = np.zeros(used_NM.shape, np.float32)
    ids_NM[used_NM], weights_NM[used_NM] = ids.flatten().to_numpy(), weights.flatten().to_numpy()
    return {TAIL_IDS: ids_NM, TAIL_WEIGHTS: weights_NM}


def _require_width(lengths_N: npt.NDArray[Any], spec: TailSampleSpec, name: str) -> None:
    problem = f"{name}: more than {spec.width} tail samples"
    require_rows(lengths_N <= spec.width, problem)


# -- checks ----------------------------------------------------------------------------------------
def check_shapes(optional: Columns, spec: LabelSetSpec, num_rows: int, *, name: str) -> None:
    """Refuse a sample that lacks a requested column, or has one of another shape.

    Raises:
        BadLabelError: naming the column.
    """
    for column in arrow_columns(spec):
        if column not in optional:
            raise BadLabelError(f"{name}: {column} was requested and is missing")
    for column in scalar_columns(spec.columns):
        shape = optional[column].shape
        if shape != (num_rows,):
            raise BadLabelError(f"{name}: {column} has shape {shape}, not ({num_rows},)")
    if spec.tail_samples is not None:
        ids, weights = optional[TAIL_IDS].shape, optional[TAIL_WEIGHTS].shape
        if ids != weights or len(ids) != 2 or ids[0] != num_rows:
            raise BadLabelError(
                f"{name}: tail_ids and tail_weights have the shapes {ids} and {weights}, not twice "
                f"({num_rows}, M)"
            )


def check_columns(
    optional: Columns,
    log_tail_mass_N: npt.NDArray[np.float32],
    spec: LabelSetSpec,
    *,
    name: str,
) -> None:
    """Refuse optional columns that cannot be a teacher's; cheap enough for every read.

    Args:
        optional: Columns of N rows, with the right shapes.
        log_tail_mass_N: float32[N], nats.
        spec: Of the label set.
        name: What to call the rows in errors.

    Raises:
        NotFiniteError: for NaN or an infinity.
        VocabularyError: for a sampled id outside the effective vocabulary.
        UnsortedError: for sampled ids that do not ascend.
        MassError: for weights that add up to more than what they cover.
        BadLabelError: for a power sum out of its bounds.
    """
    for column in scalar_columns(spec.columns):
        require_rows(
            np.isfinite(optional[column]), f"{name}: {column} is not finite", NotFiniteError
        )
    for power, alpha in POWERS.items():
        _check_power_sum(optional, power, alpha, name)
    if spec.tail_samples is not None:
        _check_tail_samples(optional, spec.tail_samples, log_tail_mass_N, spec.vocab_size, name)


def _check_power_sum(optional: Columns, power: str, alpha: float, name: str) -> None:
    """``L(alpha) = log sum p**alpha`` is convex, 0 at alpha = 1 and log of the vocabulary at 0."""
    sum_column, slope_column = LOG_POWER_SUM + power, POWER_SLOPE + power
    if sum_column not in optional:
        return
    sums_N: npt.NDArray[np.float64] = optional[sum_column].astype(np.float64)
    # rows of a padded output layer count too, so the bound is that of the largest vocabulary
    largest = math.log(MAX_VOCAB_SIZE)
    bound = (1 - alpha) * largest
    inside_N = (sums_N >= min(0.0, bound) - POWER_TOLERANCE_NATS) & (
        sums_N <= max(0.0, bound) + POWER_TOLERANCE_NATS
    )
    require_rows(inside_N, f"{name}: {sum_column} leaves its bounds 0 and {bound:.2f}")
    if slope_column not in optional:
        return
    slopes_N: npt.NDArray[np.float64] = optional[slope_column].astype(np.float64)
    inside_N = (slopes_N <= -sums_N / (1 - alpha) + POWER_TOLERANCE_NATS) & (
        slopes_N >= (sums_N - largest) / alpha - POWER_TOLERANCE_NATS
    )
    require_rows(inside_N, f"{name}: {slope_column} is no slope of a curve through {sum_column}")


def _check_tail_samples(
    optional: Columns,
    spec: TailSampleSpec,
    log_tail_mass_N: npt.NDArray[np.float32],
    vocab_size: int,
    name: str,
) -> None:
    ids_NM: npt.NDArray[np.int32] = optional[TAIL_IDS]
    weights_NM: npt.NDArray[np.float32] = optional[TAIL_WEIGHTS]
    used_NM = ids_NM != UNUSED_ID
    lengths_N = used_NM.sum(axis=1)
    _require_width(lengths_N, spec, name)
    require_rows(
        used_NM == (np.arange(used_NM.shape[1]) < lengths_N[:, None]),
        f"{name}: an unused tail sample stands before a used one",
    )
    require_rows(
        ~used_NM | ((ids_NM >= 0) & (ids_NM < vocab_size)),
        f"{name}: a sampled id leaves the vocabulary {vocab_size}",
        VocabularyError,
    )
    require_rows(
        ~used_NM[:, 1:] | (np.diff(ids_NM, axis=1) > 0),
        f"{name}: sampled ids do not ascend",
        UnsortedError,
    )
    require_rows(np.isfinite(weights_NM), f"{name}: a tail weight is not finite", NotFiniteError)
    require_rows(weights_NM >= 0, f"{name}: a tail weight is negative")
    require_rows(used_NM | (weights_NM == 0), f"{name}: an unused tail sample has a weight")
    covered_N = np.ones(len(ids_NM)) if isinstance(spec, CountsSpec) else np.exp(log_tail_mass_N)
    slack = spec.threshold if isinstance(spec, ThresholdSpec) else 0.0
    require_rows(
        weights_NM.sum(axis=1) <= covered_N + slack + MASS_TOLERANCE,
        f"{name}: tail weights add up to more than what they cover",
        MassError,
    )


def check_disjoint(
    optional: Columns, head_ids_NK: npt.NDArray[np.int32], spec: LabelSetSpec, *, name: str
) -> None:
    """Refuse samples of the tail that are stored ids: their probability would count twice.

    Raises:
        BadLabelError: naming the row.
    """
    if spec.tail_samples is None or isinstance(spec.tail_samples, CountsSpec):
        return
    tail_NM = optional[TAIL_IDS]
    first_N1 = np.arange(len(tail_NM))[:, None] * spec.vocab_size  # ids of rows do not meet
    stored = np.where(head_ids_NK == UNUSED_ID, -1, head_ids_NK + first_N1)
    again_NM = np.isin(tail_NM + first_N1, stored) & (tail_NM != UNUSED_ID)
    require_rows(~again_NM, f"{name}: a sample of the tail is among the stored ids")
