"""The steps of a project, one file each: prepare, plan, label, train, evaluate, report.

A step is keyed by its inputs, publishes its output in one atomic move and is skipped where that
output exists. Steps take a :class:`pipeline.project.Project` and return frozen values.
"""
