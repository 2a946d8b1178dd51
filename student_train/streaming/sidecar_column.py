"""A column of a sidecar for the samples of a training, read once and held in memory."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from storage.errors import NotLabelledError
from storage.label_set import LabelSet
from storage.sidecar import read_spec
from student_train.errors import PreflightError
from student_train.weights.config import SidecarWeightConfig

Float32s = npt.NDArray[np.float32]


def read_sidecar_column(
    sets: Sequence[LabelSet], config: SidecarWeightConfig, sample_keys: Sequence[str]
) -> dict[str, Float32s]:
    """The weights of every sample by its key, float32[N] in the order of its label rows.

    A sidecar belongs to one label set; samples that are served from another set of the same
    generation have the same tokens, so its numbers are theirs.

    Args:
        sets: Label sets that may have the sidecar.
        config: Which sidecar and which column.
        sample_keys: The samples.

    Raises:
        PreflightError: if there is no such sidecar or column, or a value leaves [0, 1].
        NotLabelledError: if it has no numbers for some sample.
        ShardCorruptError: if it is damaged.
    """
    wanted = set(sample_keys)
    owners = [
        found
        for found in sets
        if config.sidecar in found.objects.directories(f"{found.prefix}/sidecars")
    ]
    if not owners:
        raise PreflightError(
            f"no label set of these labels has the sidecar {config.sidecar} "
            f"(looked in {', '.join(found.key for found in sets)}); compute it first"
        )
    values: dict[str, Float32s] = {}
    for owner in owners:
        spec = read_spec(owner, config.sidecar)
        if config.column not in spec.columns:
            raise PreflightError(
                f"sidecar {config.sidecar} has no column {config.column!r}, it has "
                f"{', '.join(spec.columns)}; set train.loss.weight.column to one of them"
            )
        table = owner.sidecar(spec).to_arrow()
        keys = np.array(table["sample_key"].to_pylist())
        column_N = table[config.column].to_numpy()
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
        for start, stop in pairwise([*starts.tolist(), len(keys)]):
            if keys[start] in wanted:
                values.setdefault(str(keys[start]), column_N[start:stop])
    _check(values, config, sample_keys)
    return values


def _check(
    values: dict[str, Float32s], config: SidecarWeightConfig, sample_keys: Sequence[str]
) -> None:
    absent = [key for key in sample_keys if key not in values]
    if absent:
        raise NotLabelledError(
            f"sidecar {config.sidecar} has no numbers for {len(absent)} of {len(sample_keys)} "
            f"samples (the first is {absent[0]}); extend it"
        )
    for key, rows_N in values.items():
        if not ((rows_N >= 0) & (rows_N <= 1)).all():
            raise PreflightError(
                f"sidecar {config.sidecar}, column {config.column!r}: a weight of sample {key} is "
                f"outside 0 to 1 (they are {rows_N.min():g} to {rows_N.max():g}); scale the column"
            )
