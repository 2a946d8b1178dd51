"""What a job is given: one directory with the project's files and our packages."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.layout import PACKAGES
from storage.errors import ConfigError

OURS = Path(__file__).resolve().parents[1]
"""Where the packages lie that run here; all in one directory (:mod:`pipeline.layout`)."""

EXCLUDED = ("**/__pycache__",)
"""Never uploaded, beside what ``.gitignore`` and ``.rayignore`` name."""


@contextmanager
def upload_directory(working_dir: Path) -> Iterator[Path]:
    """The directory to upload: the working directory itself where it is a checkout of ours.

    Where it has none of our packages, a folder of links to its files and to the packages that run
    here, so that a project needs no copy of them and nodes need nothing installed.

    Raises:
        ConfigError: if the working directory is none, or has something else by a package's name.
    """
    if not working_dir.is_dir():
        raise ConfigError(
            f"working directory {str(working_dir)!r} is no directory; name the one with the "
            "configuration and the prompt files by --working-dir"
        )
    ours = [name for name in PACKAGES if (working_dir / name / "__init__.py").is_file()]
    taken = [name for name in PACKAGES if (working_dir / name).exists() and name not in ours]
    if len(ours) == len(PACKAGES):
        yield working_dir
        return
    if ours or taken:
        raise ConfigError(
            f"working directory {str(working_dir)!r} has {(ours + taken)[0]!r} without being a "
            "checkout of distillcache, whose package of that name the job needs there; rename it, "
            "or submit from another directory"
        )
    with tempfile.TemporaryDirectory() as folder:
        for entry in working_dir.resolve().iterdir():
            (Path(folder) / entry.name).symlink_to(entry)
        for name in PACKAGES:
            (Path(folder) / name).symlink_to(OURS / name)
        yield Path(folder)
