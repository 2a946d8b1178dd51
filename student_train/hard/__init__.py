"""The hard side of the supervision: which token is the hard label, and the term made of it.

``labels.py`` chooses the token. A *hard term* is one file here and one line below; its options
are a config class in ``config.py`` beside it (one more line, in ``HardTermConfig``), its formula a
section of ``docs/weights.md``, its tests ``tests/unit/student_train/test_hard_<name>.py``. The
values are import strings, so listing the names does not import torch.
"""

HARD_TERMS = {
    "cross_entropy": "student_train.hard.cross_entropy:CrossEntropy",
    "risk_guided": "student_train.hard.risk_guided:RiskGuided",
}
