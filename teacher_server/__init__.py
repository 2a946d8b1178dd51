"""The teacher stage: prompts in, labelled samples out. Knows vllm; not ray, not the student.

* a new backend: one file in ``backends/`` and one line in ``backends/__init__.py``
* which prompt files are understood: ``prompts.py``
* user settings: ``config.py``
"""
