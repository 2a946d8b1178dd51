"""The import names are generic, so make sure that they are ours."""

import importlib.util
from pathlib import Path

PACKAGES = ("storage", "teacher_server", "student_train", "pipeline")


def check_layout() -> None:
    """All four packages must come from one directory.

    Raises:
        ImportError: naming where each one was found.
    """
    origins = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origins[name] = Path(spec.origin).parent.parent if spec and spec.origin else None
    if len(set(origins.values())) != 1 or None in origins.values():
        found = ", ".join(f"{name}: {origin}" for name, origin in origins.items())
        raise ImportError(
            f"the packages of distillcache must lie in one directory, found {found}; "
            "another installed package uses one of these names"
        )
