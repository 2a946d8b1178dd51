"""The import names are generic; a foreign package of one of these names is noticed."""

import subprocess
import sys
from pathlib import Path

from pipeline.layout import PACKAGES, check_layout

ROOT = Path(__file__).resolve().parents[3]


def test_all_packages_come_from_this_tree() -> None:
    check_layout()


def test_a_foreign_package_is_named_with_its_place(tmp_path: Path) -> None:
    foreign = tmp_path / "storage"
    foreign.mkdir()
    (foreign / "__init__.py").touch()
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from pipeline.layout import check_layout\n"
        "check_layout()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "must lie in one directory" in done.stderr
    assert f"storage: {tmp_path}" in done.stderr
    assert f"pipeline: {ROOT}" in done.stderr


def test_the_packages_are_those_of_the_tree() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(PACKAGES) == found
