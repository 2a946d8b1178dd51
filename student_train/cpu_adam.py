"""DeepSpeed's Adam for the CPU, which it compiles on first use.

The compiled module lies in a directory of this environment and host. torch guards a build with a
lock *file*, which a killed build leaves behind, and for which every later process waits without an
end or a word. So builds here hold a lock of the kernel as well, which dies with its holder: who
holds that one knows that a lock file belongs to nobody.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from student_train.errors import PreflightError

DIRECTORY_VARIABLE = "TORCH_EXTENSIONS_DIR"
"""Where torch puts what it compiles."""

WAY_OUT = "set optimizer.type: adamw without deepspeed.offload_optimizer"


def cpu_adam_class() -> Any:
    """``DeepSpeedCPUAdam``, compiled and loaded; call on every rank.

    The first rank of a host compiles, the others wait for it.

    Raises:
        PreflightError: if there is no compiler or no ninja, or the build fails.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    directory = build_directory()
    os.environ[DIRECTORY_VARIABLE] = str(directory)
    builds = os.environ.get("LOCAL_RANK", "0") == "0"
    problem = _build(CPUAdamBuilder(), directory) if builds else None
    problems: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise PreflightError(found)
    return DeepSpeedCPUAdam


def build_directory() -> Path:
    """Where this environment compiles to on this host, unless its user named a place."""
    if DIRECTORY_VARIABLE in os.environ:
        return Path(os.environ[DIRECTORY_VARIABLE])
    # code is made for one processor, against one torch; two environments would rebuild each other's
    identity = "\n".join([sys.prefix, torch.__version__, platform.node()])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return Path.home() / ".cache" / "distillcache" / "torch_extensions" / digest


def _build(builder: Any, directory: Path) -> str | None:
    """Compile, or find what was compiled; returns what is wrong, as one sentence."""
    _find_ninja()
    for tool in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(tool) is None:
            return (
                f"optimizer.type: cpu_adam is compiled on first use, and {tool} is not on PATH; "
                f"install it, or {WAY_OUT}"
            )
    with exclusive_build(directory, builder.name):
        if not (directory / builder.name / f"{builder.name}.so").exists():
            sys.stderr.write(
                f"compiling DeepSpeed's CPU Adam into {directory}, once for this environment; this "
                "takes a minute or two\n"
            )
        try:
            builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            return (
                f"DeepSpeed's CPU Adam cannot be compiled in {directory}: {reason}; mend that, or "
                f"{WAY_OUT}"
            )
    return None


def _find_ninja() -> None:
    """Put the environment's own programs on PATH where it was not activated."""
    own = Path(sys.executable).parent
    if shutil.which("ninja") is None and (own / "ninja").exists():
        os.environ["PATH"] = f"{own}{os.pathsep}{os.environ.get('PATH', '')}"


@contextmanager
def exclusive_build(directory: Path, name: str) -> Iterator[None]:
    """Hold the lock of the builds of ``name``, and remove the lock file of one that was killed."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.flock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        stale = directory / name / "lock"
        if stale.exists():
            sys.stderr.write(f"a build was killed and left {stale}; removing it\n")
            stale.unlink()
        yield
