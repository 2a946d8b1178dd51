"""The steps of the CPU image, run as a script in a clean environment: no container engine needed.

Paths of the image are moved below a scratch folder; the system packages are the only step left out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOVED = ("/opt/venv", "/src", "/workspace", "/etc/profile.d")
"""Folders that the steps write to."""
OF_THE_SYSTEM = "apt-get"


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Every instruction with its argument; continued lines are joined, comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name, argument.strip()) for name, argument in found]


class Image:
    """What the instructions have made so far, below ``root``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        kept = ("PATH", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONFIG_FILE")
        self.environment = {name: os.environ[name] for name in kept if name in os.environ}
        self.environment |= {"HOME": str(root / "home"), "TORCH_INDEX": ""}
        base = root / "base"  # where the image of Python has its `python`
        base.mkdir(parents=True)
        (base / "python").symlink_to(Path(sys.base_prefix) / "bin" / "python3.11")
        self.environment["PATH"] = f"{base}:{self.environment['PATH']}"
        for folder in ("opt", "etc/profile.d"):
            (root / folder).mkdir(parents=True)

    def _moved(self, text: str) -> str:
        for folder in MOVED:
            text = text.replace(folder, f"{self._root}{folder}")
        return text

    def env(self, argument: str) -> None:
        """ENV: one or more NAME=value."""
        for word in argument.split():
            name, value = self._moved(word).split("=", 1)
            self.environment[name] = value.replace("$PATH", self.environment["PATH"])

    def copy(self, argument: str) -> None:
        """COPY of files of the checkout; what comes from another stage is there already."""
        words = [word for word in argument.split() if not word.startswith("--chown")]
        if words[0].startswith("--from"):
            return
        *sources, target = words
        for source in sources:
            place = Path(self._moved(target))
            if target.endswith("/"):
                place = place / Path(source).name
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, place, ignore=ignored)
            else:
                shutil.copy(ROOT / source, place)

    def run(self, command: str, *, cwd: str = "/opt") -> str:
        """RUN, or what the image starts with; returns its output."""
        done = subprocess.run(
            ["bash", "-euc", self._moved(command)],
            env=self.environment,
            cwd=f"{self._root}{cwd}",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout


def test_the_cpu_image_installs_and_starts(tmp_path: Path) -> None:
    image = Image(tmp_path)
    ran = []
    for name, argument in instructions(ROOT / "docker" / "Dockerfile.cpu"):
        if name == "ENV":
            image.env(argument)
        elif name == "COPY":
            image.copy(argument)
        elif name == "RUN" and OF_THE_SYSTEM not in argument:
            image.run(argument)
            ran.append(argument)
    assert any("constraints.txt" in command for command in ran)

    found = image.run("command -v python; python -m pipeline --help", cwd="/workspace")
    assert found.startswith(f"{tmp_path}/opt/venv/bin/python")
    assert "submit" in found
    image.run("ray --version; python -m pipeline doctor", cwd="/workspace")
    version = image.run("python -m pip show distillcache", cwd="/workspace")
    assert f"Location: {tmp_path}/opt/venv" in version  # installed, not this checkout
