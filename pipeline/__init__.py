"""The top layer: what a user touches. The only package that knows ray; nothing imports it.

* a new command: one file in ``commands/`` and one line in ``commands/__init__.py``
* a step of a project: one file in ``steps/``
* a user setting: ``config.py`` of the package that uses it
"""
