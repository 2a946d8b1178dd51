"""Where packages come from: ours from one directory, the heavy ones from an extra."""

import importlib.util
from pathlib import Path

PACKAGES = ("storage", "teacher_server", "student_train", "pipeline")


EXTRA_OF = {
    "torch": "student",
    "transformers": "student",
    "deepspeed": "student",
    "safetensors": "student",
    "ray": "ray",
    "vllm": "teacher-cpu",
}
"""Which extra of the distribution brings a package that the base installation lacks."""


def install_command(package: str) -> str:
    """How to install a package together with what its stage needs."""
    extra = EXTRA_OF.get(package)
    return "pip install " + (f"'distillcache[{extra}]'" if extra else "distillcache")


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
