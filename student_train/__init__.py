"""The student stage: cached labels in, a trained Hugging Face checkpoint out.

Knows torch and DeepSpeed; not ray, not vllm.

* a new loss or divergence: one file in ``losses/`` and one line in ``losses/__init__.py``
* a new weight policy: one file in ``weights/`` and one line in ``weights/__init__.py``
* user settings: ``config.py``
"""
