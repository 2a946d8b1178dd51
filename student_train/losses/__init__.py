"""Distillation losses and divergences. To add one, write ``<name>.py`` here and add one line below.

A *divergence* compares teacher and student on the k+1 categories (top-k tokens and tail) and
returns value and gradient; a *loss* combines a divergence with hard labels. Options of a divergence
are a config class in ``student_train/losses/config.py``, those of a loss in
``student_train/config.py``; the maths goes in ``docs/losses.md``, the dense formula in
``reference.py``, the tests in ``tests/unit/student_train/test_<name>.py``. The values are import
strings, so listing the names does not import torch; ``make_divergence`` in ``soft_term.py`` binds
options to a divergence.
"""

LOSSES = {
    "hybrid": "student_train.losses.hybrid:hybrid_loss",
    "taid": "student_train.losses.hybrid:hybrid_loss",
}

DIVERGENCES = {
    "forward_kl": "student_train.losses.forward_kl:forward_kl",
    "reverse_kl": "student_train.losses.reverse_kl:reverse_kl",
    "jsd": "student_train.losses.jsd:jsd",
    "skew_forward_kl": "student_train.losses.skew_kl:skew_forward_kl",
    "skew_reverse_kl": "student_train.losses.skew_kl:skew_reverse_kl",
    "tvd": "student_train.losses.tvd:tvd",
    "adaptive_kl": "student_train.losses.adaptive_kl:adaptive_kl",
    "entropy_adaptive_kl": "student_train.losses.adaptive_kl:entropy_adaptive_kl",
    "alpha_beta": "student_train.losses.alpha_beta:alpha_beta",
    "taid": "student_train.losses.taid:taid",
}
