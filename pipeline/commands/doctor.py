"""``distill doctor``: is everything here that the stages need?"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.commands.options import (
    DEFAULT_STORE,
    JsonOption,
    StoreOption,
    console,
    print_json,
)
from pipeline.layout import install_command
from storage.errors import DistillError

CHECKED_PACKAGES = ("numpy", "pyarrow", "obstore", "torch", "transformers", "deepspeed", "ray")

Verdict = Literal["ok", "missing", "broken", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One checked thing."""

    what: str
    verdict: Verdict
    found: str
    fix: str = ""


def doctor(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Check Python, packages, devices, compiler and store access; say how to fix what is wrong."""
    from rich.table import Table
    from rich.text import Text

    out = console(as_json=as_json)
    findings = []
    with out.status("checking") as status:
        for check in CHECKS:
            status.update(f"checking {check.__name__.removeprefix('check_')}")
            findings += check()
        findings += check_store(store or DEFAULT_STORE)
    if as_json:
        print_json([{field: getattr(f, field) for field in f.__slots__} for f in findings])
    else:
        table = Table(title="distill doctor")
        for title in ("what", "verdict", "found", "how to fix"):
            table.add_column(title)
        colors = {"ok": "green", "note": "cyan", "missing": "yellow", "broken": "red"}
        for f in findings:
            table.add_row(f.what, Text(f.verdict, colors[f.verdict]), Text(f.found), Text(f.fix))
        out.print(table)
    bad = [f.what for f in findings if f.verdict in ("missing", "broken")]
    if bad:
        raise DistillError(f"{len(bad)} things need attention: {', '.join(bad)}")


def check_python() -> list[Finding]:
    """The interpreter and the machine."""
    version = platform.python_version()
    good = sys.version_info[:2] == (3, 11)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return [
        Finding("python", "ok" if good else "broken", version, "" if good else "use Python 3.11"),
        Finding(
            "machine", "note", f"{len(os.sched_getaffinity(0))} CPUs, {memory_gib:.1f} GiB memory"
        ),
    ]


def check_packages() -> list[Finding]:
    """Every stage's packages import, in the versions that are supported."""
    return [
        *(_import(name) for name in CHECKED_PACKAGES),
        _vllm(),
        *_breaking_packages(),
    ]


def _import(name: str) -> Finding:
    fix = install_command(name)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return Finding(name, "missing", str(error), fix)
    except Exception as error:  # noqa: BLE001 - a broken build fails in many ways; it is reported
        return Finding(name, "broken", f"{type(error).__name__}: {error}", f"reinstall: {fix}")
    return Finding(name, "ok", str(getattr(module, "__version__", "installed")))


def _vllm() -> Finding:
    from teacher_server.backends.vllm_capture import SUPPORTED_VERSIONS

    found = _import("vllm")
    supported = ", ".join(version + "x" for version in SUPPORTED_VERSIONS)
    if found.verdict == "ok" and not found.found.startswith(SUPPORTED_VERSIONS):
        return Finding("vllm", "broken", found.found, f"install a supported release: {supported}")
    return found


def _breaking_packages() -> list[Finding]:
    """Packages whose CUDA builds break the import of transformers beside a CPU torch."""
    try:
        import torch
    except ImportError:
        return []
    if torch.version.cuda is not None:
        return []
    installed = []
    for name in ("torchvision", "torchaudio", "torchcodec"):
        try:
            installed.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if not installed:
        return []
    fix = "pip uninstall torchvision torchaudio torchcodec"
    return [Finding("packages beside a CPU torch", "broken", ", ".join(installed), fix)]


def check_devices() -> list[Finding]:
    """Accelerators that torch sees."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return [Finding("devices", "note", "no GPU; everything runs on CPU")]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [Finding("devices", "ok", ", ".join(names))]


def check_compiler() -> list[Finding]:
    """A C++ compiler: some DeepSpeed optimisers are compiled at first use."""
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None:
            return [Finding("C++ compiler", "ok", path)]
    return [Finding("C++ compiler", "note", "none found", "needed only for offloaded optimisers")]


def check_ray() -> list[Finding]:
    """A local Ray starts and runs a task."""
    if importlib.util.find_spec("ray") is None:
        return []
    from pipeline.cluster import Cluster
    from pipeline.config import ClusterConfig

    try:
        with Cluster(ClusterConfig(cpus=1)) as cluster:
            ray = cluster.ray
            answer = ray.get(ray.remote(_answer).options(num_cpus=1).remote())
    except Exception as error:  # noqa: BLE001 - whatever Ray raises is what the user must see
        return [
            Finding(
                "ray task",
                "broken",
                f"{type(error).__name__}: {error}"[:300],
                "free memory and /dev/shm, or unset RAY_ADDRESS",
            )
        ]
    return [Finding("ray task", "ok" if answer == 42 else "broken", f"answered {answer}")]


def _answer() -> int:
    return 42


def check_store(uri: str) -> list[Finding]:
    """Objects can be created once and read back."""
    from storage.errors import LabelStoreError
    from storage.objects import Objects

    try:
        objects = Objects(uri)
        if not objects.exists:
            return [Finding("store", "note", f"{uri!r} does not exist yet")]
        path = f"doctor/{uuid.uuid4().hex}"
        created = objects.create(path, b"probe")
        again = objects.create(path, b"other")
        content = objects.get(path)
        objects.delete(path)
    except (LabelStoreError, OSError) as error:
        fix = "check the path, the permissions and the credentials in the environment"
        return [Finding("store", "broken", str(error)[:300], fix)]
    if not created or again or content != b"probe":
        fix = "the store must support create-if-absent (If-None-Match)"
        return [Finding("store", "broken", f"{uri}: an object was replaced", fix)]
    return [Finding("store", "ok", uri)]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    check_python,
    check_packages,
    check_devices,
    check_compiler,
    check_ray,
)
