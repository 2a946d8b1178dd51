"""Weight policies: how much every token listens to soft and to hard labels.

To add one, write ``<name>.py`` here and add one line below; its options are a config class in
``config.py`` beside it (one more line, in ``WeightConfig``), its formula a section of
``docs/weights.md``, its tests ``tests/unit/student_train/test_weights_<name>.py``. The values are
import strings, so listing the names does not import torch.
"""

WEIGHT_POLICIES = {
    "static": "student_train.weights.static:static_weight",
    "confidence": "student_train.weights.confidence:confidence_weight",
    "entropy": "student_train.weights.entropy:entropy_weight",
    "ambiguity": "student_train.weights.ambiguity:ambiguity_weight",
    "curriculum": "student_train.weights.curriculum:curriculum_weight",
    "wsl": "student_train.weights.wsl:wsl_weight",
    "sidecar": "student_train.weights.sidecar:sidecar_weight",
}
