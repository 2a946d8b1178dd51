"""The directory that a job is given."""

import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from pipeline.layout import PACKAGES
from pipeline.upload import EXCLUDED, OURS, upload_directory
from storage.errors import ConfigError

MAX_BYTES = 5_000_000


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    """A project with a configuration, prompts, and something that is not uploaded."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "run.yaml").write_text("name: mine\n")
    (folder / "data" / "train.jsonl").write_text("{}\n")
    (folder / "checkpoint.bin").write_bytes(b"0" * 100)
    (folder / ".gitignore").write_text("*.bin\n")
    return folder


def package(directory: Path, target: Path) -> Path:
    """What Ray makes of a working directory."""
    create_package(str(directory), target, True, excludes=list(EXCLUDED))
    return target


def test_a_project_gets_our_packages_beside_its_own_files(
    working_dir: Path, tmp_path: Path
) -> None:
    with upload_directory(working_dir) as uploaded:
        zipped = package(uploaded, tmp_path / "upload.zip")
    unpacked = tmp_path / "node"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", zipped, unpacked], check=True)
    assert (unpacked / "data" / "train.jsonl").read_text() == "{}\n"
    assert not (unpacked / "checkpoint.bin").exists()
    assert not list(unpacked.rglob("__pycache__"))
    # -I: nothing but this folder and the installed packages, not the current directory
    code = f"import sys; sys.path.insert(0, {str(unpacked)!r}); import pipeline.cli as c; print(c)"
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert str(unpacked / "pipeline" / "cli.py") in found.stdout, found.stderr
    assert zipped.stat().st_size < MAX_BYTES
    assert (working_dir / "data" / "train.jsonl").is_file()


def test_a_checkout_is_uploaded_as_it_is() -> None:
    with upload_directory(OURS) as uploaded:
        assert uploaded == OURS


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("is_package", [True, False])
def test_a_directory_with_one_of_our_names_is_refused(
    working_dir: Path, name: str, is_package: bool
) -> None:
    (working_dir / name).mkdir()
    if is_package:
        (working_dir / name / "__init__.py").touch()
    refused = pytest.raises(ConfigError, match=f"has '{name}' without being a checkout")
    with refused, upload_directory(working_dir):
        pass


def test_a_working_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no directory"), upload_directory(tmp_path / "gone"):
        pass
