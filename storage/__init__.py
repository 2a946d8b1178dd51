"""The lowest layer: identity, the label format and the content-addressed label cache.

Numpy, pyarrow and pydantic only; no torch, transformers, vllm, ray or deepspeed.

* what makes two labels the same: ``keys.py``
* what is on disk: ``docs/format.md``, then ``schema.py``, ``shard.py``, ``records.py``
* a new label kind: one file in ``labels/`` and one line in ``labels/__init__.py``
"""
