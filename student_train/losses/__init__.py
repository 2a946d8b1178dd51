"""Distillation losses and divergences. To add one, write ``<name>.py`` here and add one line below.

A *divergence* compares teacher and student on the k+1 categories (top-k tokens and tail) and
returns value and gradient; a *loss* combines a divergence with hard labels. Options are a config
class in ``student_train/config.py``, the maths goes in ``docs/losses.md``, the tests in
``tests/unit/student_train/test_<name>.py``. The values are import strings, so listing the names
does not import torch.
"""

LOSSES = {
    "hybrid": "student_train.losses.hybrid:hybrid_loss",
}

DIVERGENCES = {
    "forward_kl": "student_train.losses.forward_kl:forward_kl",
    "reverse_kl": "student_train.losses.reverse_kl:reverse_kl",
}
