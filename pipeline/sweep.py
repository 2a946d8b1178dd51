"""Sweeps: many students from a few lists, all over the same labels."""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from storage.config import Config

Tree = dict[str, Any]
Path = tuple[str, ...]

MAX_STUDENTS = 1000
"""A grid that is larger is a typing error."""


class SweepConfig(Config):
    """Students that differ in a few settings. Each is called by what distinguishes it."""

    grid: Tree = Field(default_factory=dict)
    """Settings of ``train`` with a list of values each, such as ``{epochs: [1, 3]}``: one student
    for every combination."""
    list: tuple[Tree, ...] = ()
    """Changes to ``train``, one student for each."""

    @field_validator("grid")
    @classmethod
    def _axes_are_lists(cls, grid: Tree) -> Tree:
        for path, values in leaves(grid):
            if not isinstance(values, list) or not values:
                raise ValueError(
                    f"{'.'.join(path)} must be a list of values with at least one, found {values!r}"
                )
        return grid

    @model_validator(mode="after")
    def _not_empty(self) -> "SweepConfig":
        if not self.grid and not self.list:
            raise ValueError("a sweep needs a grid or a list; leave the section out otherwise")
        return self

    def students(self) -> dict[str, Tree]:
        """Name and changes of every student, the grid first, its last axis fastest.

        Raises:
            ValueError: if two of them are the same, or there are more than ``MAX_STUDENTS``.
        """
        points = [*_combinations(self.grid), *(dict(leaves(change)) for change in self.list)]
        if len(points) > MAX_STUDENTS:
            raise ValueError(f"{len(points)} students are wanted, at most {MAX_STUDENTS} may be")
        paths = {path for point in points for path in point}
        short = {path: _shortest(path, paths) for path in paths}
        students: dict[str, Tree] = {}
        for point in points:
            parts = [f"{short[path]}-{_slug(value)}" for path, value in point.items()]
            name, tree = "_".join(parts) or "unchanged", _tree(point)
            if tree in students.values():
                raise ValueError(f"{name!r} is there twice; every student needs changes of its own")
            while name in students:  # values that differ in signs which names cannot hold
                name += "-"
            students[name] = tree
        return students


def _combinations(grid: Tree) -> list[dict[Path, Any]]:
    axes = dict(leaves(grid))
    if not axes:
        return []
    size = math.prod(map(len, axes.values()))
    if size > MAX_STUDENTS:
        raise ValueError(f"the grid has {size} points, at most {MAX_STUDENTS} may be")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def leaves(tree: Mapping[str, Any], before: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Path and value of everything in a tree that is no section; dots separate as everywhere."""
    for name, value in tree.items():
        path = (*before, *str(name).split("."))
        if isinstance(value, Mapping) and value:
            yield from leaves(value, path)
        else:
            yield path, value


def _tree(point: Mapping[Path, Any]) -> Tree:
    tree: Tree = {}
    for path, value in point.items():
        section = tree
        for name in path[:-1]:
            section = section.setdefault(name, {})
        section[path[-1]] = _tree(dict(leaves(value))) if isinstance(value, Mapping) else value
    return tree


def _shortest(path: Path, paths: set[Path]) -> str:
    """The fewest last parts of a path that no other one ends with."""
    for length in range(1, len(path)):
        if sum(other[-length:] == path[-length:] for other in paths) == 1:
            return ".".join(path[-length:])
    return ".".join(path)


def _slug(value: Any) -> str:
    """A value as a part of a name: letters, digits, dots and hyphens."""
    if isinstance(value, Mapping) and isinstance(value.get("type"), str):
        rest = {name: inner for name, inner in value.items() if name != "type"}
        return "-".join([value["type"], *([_slug(rest)] if rest else [])])
    text = value if isinstance(value, str) else json.dumps(value).replace("e+", "e")
    if not isinstance(value, str) and text.startswith("-"):
        text = f"minus{text}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-") or "empty"
