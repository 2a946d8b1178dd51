"""Where DeepSpeed's CPU Adam is compiled, and what happens where it cannot be."""

import subprocess
import sys
from pathlib import Path

import pytest

from student_train import cpu_adam
from student_train.cpu_adam import DIRECTORY_VARIABLE, build_directory, exclusive_build


class Builder:
    name = "cpu_adam"

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.loads = error, 0

    def load(self, verbose: bool) -> None:
        self.loads += 1
        if self.error is not None:
            raise self.error


def test_every_environment_has_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    first = build_directory()
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert build_directory() not in (first, Path())
    monkeypatch.setenv(DIRECTORY_VARIABLE, "/named/place")
    assert build_directory() == Path("/named/place")


def test_the_lock_file_of_a_killed_build_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch would wait for it for ever."""
    stale = tmp_path / "cpu_adam" / "lock"
    stale.parent.mkdir()
    stale.touch()
    with exclusive_build(tmp_path, "cpu_adam"):
        assert not stale.exists()
    assert str(stale) in capsys.readouterr().err


def test_the_lock_file_of_a_build_at_work_is_left_alone(tmp_path: Path) -> None:
    """Whoever builds holds the kernel's lock: a second one waits before it looks."""
    attempt = (
        "import fcntl, pathlib, sys\n"
        "with (pathlib.Path(sys.argv[1]) / 'cpu_adam.flock').open('w') as file:\n"
        "    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    )
    with exclusive_build(tmp_path, "cpu_adam"):
        second = subprocess.run(
            [sys.executable, "-c", attempt, tmp_path], capture_output=True, text=True, check=False
        )
        assert "BlockingIOError" in second.stderr
    third = subprocess.run([sys.executable, "-c", attempt, tmp_path], check=False)
    assert third.returncode == 0


@pytest.mark.parametrize("tool", ["c++", "ninja"])
def test_a_missing_tool_is_one_sentence_with_a_way_out(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(
        cpu_adam.shutil, "which", lambda name: None if name == tool else f"/bin/{name}"
    )
    builder = Builder()
    problem = cpu_adam._build(builder, tmp_path)
    assert problem is not None
    assert f"{tool} is not on PATH" in problem
    assert "optimizer.type: adamw" in problem
    assert builder.loads == 0


def test_a_build_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_adam.shutil, "which", lambda name: f"/bin/{name}")
    problem = cpu_adam._build(Builder(RuntimeError("no space left\na long log")), tmp_path)
    assert problem is not None
    assert "no space left; mend that" in problem
    assert "long log" not in problem


def test_the_first_build_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_adam.shutil, "which", lambda name: f"/bin/{name}")
    assert cpu_adam._build(Builder(), tmp_path) is None
    assert "once for this environment" in capsys.readouterr().err
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    assert cpu_adam._build(Builder(), tmp_path) is None
    assert capsys.readouterr().err == ""
