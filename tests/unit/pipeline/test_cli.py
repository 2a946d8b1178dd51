"""The command line: help is instant, and every end has its exit code."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from pipeline.cli import main
from pipeline.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[3]
HEAVY = {"torch", "vllm", "ray", "deepspeed", "transformers", "datasets", "pyarrow"}

PROBE = f"""
import sys
from pipeline.cli import main
code = main(["--help"])
sys.stderr.write(",".join(sorted({HEAVY!r} & set(sys.modules))))
sys.exit(code)
"""


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=environment
    )


def test_help_answers_without_loading_anything_heavy() -> None:
    done = run("-c", PROBE)
    assert done.returncode == 0
    assert done.stderr == ""
    assert set(COMMANDS) <= set(done.stdout.split())


def test_a_problem_of_the_user_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    done = run("-m", "pipeline", "plan", "gone.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cannot read config 'gone.yaml'")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Usage: distill {command}" in shown
    module, attribute = COMMANDS[command].split(":")
    found = getattr(importlib.import_module(module), attribute)
    summary = found.info.help if isinstance(found, typer.Typer) else found.__doc__
    assert summary.splitlines()[0] in shown


@pytest.mark.parametrize("words", [["frobnicate"], ["plan"], ["plan", "a.yaml", "--frob"]])
def test_wrong_usage_is_exit_code_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert "Usage: distill" in captured.err


def test_a_wrong_setting_names_its_key(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(project_file), "--set", "teacher.modle=x"]) == 2
    error = capsys.readouterr().err
    assert error == (f"error: {project_file}: unknown key 'teacher.modle'; did you mean 'model'?\n")


def test_a_bug_is_raised_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 and a traceback come from Python itself."""
    monkeypatch.setitem(COMMANDS, "plan", "pipeline.commands.plan:no_such_function")
    with pytest.raises(AttributeError):
        main(["plan", "--help"])


def test_training_without_a_section_train_is_refused(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("train", "evaluate"):
        assert main([command, str(project_file)]) == 2
        assert "the config has no section train" in capsys.readouterr().err


def test_training_without_labels_says_what_to_run(
    project_file: Path, teacher_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(project_file), "--set", f"train.model={teacher_directory}"]
    assert main(words) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "4 of 4 training samples have no labels yet; run `distill label` first" in shown
