"""Weight policies: how much every token listens to soft and to hard labels.

To add one, write ``<name>.py`` here and add one line below; its options are a config class in
``student_train/config.py``, its formula a section of ``docs/losses.md``.
"""

WEIGHT_POLICIES = {
    "static": "student_train.weights.static:static_weight",
}
