"""What may be submitted, and with which command."""

from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.submit import entrypoint, require_lasting_paths
from storage.errors import ConfigError


def test_the_command_names_the_config_as_the_job_will_see_it(tmp_path: Path) -> None:
    command = entrypoint(tmp_path / "my" / "run.yaml", ["name=a b"], tmp_path)
    assert command == "python -u -m pipeline run my/run.yaml --set 'name=a b'"


def test_a_config_that_would_not_be_uploaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="outside of the working directory"):
        entrypoint(tmp_path / "run.yaml", [], tmp_path / "work")


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
