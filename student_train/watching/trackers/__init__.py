"""Where metrics go beside ``metrics.jsonl``. To add one, write ``<name>.py`` here and a line below.

A tracker gets the metrics of optimiser steps and held-out evaluations on rank 0. Its name goes in
``TrackerName`` of ``student_train/watching/config.py`` too. The values are import strings of the
class and the package that it needs.
"""

TRACKERS = {
    "tensorboard": ("student_train.watching.trackers.tensorboard:TensorBoard", "tensorboard"),
    "wandb": ("student_train.watching.trackers.wandb:WeightsAndBiases", "wandb"),
    "mlflow": ("student_train.watching.trackers.mlflow:MLflow", "mlflow"),
}
