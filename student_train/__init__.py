"""The student stage: cached labels in, a trained Hugging Face checkpoint out.

Knows torch and DeepSpeed; not ray, not vllm.

* ``trainer.py`` is the training from start to end, ``engine.py`` what it takes of DeepSpeed
* ``streaming/``: from cached labels to micro-batches; ``models/``: the student and its export
* ``checkpoints/``: what a resume needs; ``preflight/``: what is checked before the first step
* ``watching/``: metrics, trackers, held-out evaluation, which step is exported
* a new loss or divergence: one file in ``losses/`` and one line in ``losses/__init__.py``
* a new weight policy: one file in ``weights/`` and one line in ``weights/__init__.py``
* user settings: ``config.py``
"""
