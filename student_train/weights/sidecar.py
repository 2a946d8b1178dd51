"""Soft weights from a sidecar: numbers that somebody computed for every label row."""

from student_train.losses.base import TeacherRows
from student_train.weights.base import TokenWeights, WeightContext
from student_train.weights.config import SidecarWeightConfig


def sidecar_weight(
    rows: TeacherRows, config: SidecarWeightConfig, context: WeightContext
) -> TokenWeights:
    """The column as it is, or one minus it.

    The values are checked to lie in [0, 1] when they are read. Bridge-Garden's risk kappa is such
    a number, once it is scaled.
    """
    assert rows.sidecar_M is not None  # the reader attaches it or refuses
    return TokenWeights.blend(1.0 - rows.sidecar_M if config.reverse else rows.sidecar_M)
