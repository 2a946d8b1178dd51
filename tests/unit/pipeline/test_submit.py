"""What may be submitted, and with which command."""

from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.layout import PACKAGES
from pipeline.submit import entrypoint, require_lasting_paths
from storage.errors import ConfigError


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    for name in PACKAGES:
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "__init__.py").touch()
    (tmp_path / "work" / "my").mkdir()
    (tmp_path / "work" / "my" / "run.yaml").touch()
    return tmp_path / "work"


def test_the_command_names_the_config_as_the_job_will_see_it(working_dir: Path) -> None:
    command = entrypoint(working_dir / "my" / "run.yaml", ["name=a b"], working_dir)
    assert command == "python -u -m pipeline run my/run.yaml --set 'name=a b'"


def test_a_config_that_would_not_be_uploaded_is_refused(working_dir: Path) -> None:
    with pytest.raises(ConfigError, match="outside of the working directory"):
        entrypoint(working_dir.parent / "run.yaml", [], working_dir)


def test_a_working_directory_without_our_packages_is_refused(working_dir: Path) -> None:
    (working_dir / "storage" / "__init__.py").unlink()
    with pytest.raises(ConfigError, match="has no package 'storage'"):
        entrypoint(working_dir / "my" / "run.yaml", [], working_dir)


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        ("store=./labels", True),
        ("runs=runs", True),
        ("store=s3://bucket/labels", False),
        ("runs=/shared/runs", False),
    ],
)
def test_what_a_job_makes_must_outlive_it(project_file: Path, override: str, refused: bool) -> None:
    config = load_config(project_file, [override])
    if refused:
        with pytest.raises(ConfigError, match="is a relative path"):
            require_lasting_paths(config)
    else:
        require_lasting_paths(config)
