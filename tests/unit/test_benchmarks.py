"""Benchmarks keep one convention: the same flags, the same table, a page of results beside them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text())

TOY = """
import harness

# isort: split
import os
import sys

import storage.keys

arguments = harness.argument_parser("A toy.").parse_args()
times = harness.interleaved({"one": lambda: sum(range(20000)), "two": lambda: sum(range(40000))})
assert all(len(seconds) == 5 for seconds in times.seconds.values())
goals = [
    harness.Goal("threads", "1", os.environ["OMP_NUM_THREADS"], True),
    harness.Goal("ratio", ">= 0.01x", times.ratio("two", "one").text("x"), True, "one"),
    harness.Goal("large", ">= 2x", harness.FULL_ONLY, None),
    harness.Goal("gpu", ">= 2x", harness.NOT_MEASURED, None),
    harness.Goal("kept", "yes", "maybe", os.environ["KEPT"] == "yes"),
]
sys.exit(harness.report(goals, notes=["A note."]))
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_has_the_common_flags(script: str) -> None:
    text = (BENCHMARKS / script).read_text()
    assert "harness.argument_parser(" in text  # it declares --quick
    assert "arguments.quick" in text
    assert "harness.report(" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_imports_the_harness_before_numpy(script: str) -> None:
    """Threads are limited, and ``import storage`` is our package, only after that."""
    imports = re.findall(r"^(?:import|from) (\w+)", (BENCHMARKS / script).read_text(), re.MULTILINE)
    assert imports[0] == "harness"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_has_a_page_of_results(script: str) -> None:
    page = (BENCHMARKS / script).with_suffix(".md").read_text()
    for field in ("command", "commit", "machine", "date", "versions"):
        assert re.search(rf"^\* {field}: \S+", page, re.MULTILINE), f"{field} is missing"
    assert f"`python benchmarks/{script}" in page
    assert "| what | goal | measured | holds | compared with |" in page


@pytest.mark.parametrize(("kept", "exit_code"), [("yes", 0), ("no", 1)])
def test_the_exit_code_says_whether_every_measured_goal_holds(
    tmp_path: Path, kept: str, exit_code: int
) -> None:
    (tmp_path / "storage.py").write_text(TOY)  # named like a package, as ours are
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS), "KEPT": kept}
    found = subprocess.run(
        [sys.executable, tmp_path / "storage.py", "--quick"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == exit_code, found.stderr
    page = (tmp_path / "storage.md").read_text()
    assert "| threads | 1 | 1 | yes |  |" in page
    assert "| large | >= 2x | full only |  |  |" in page
    assert "| gpu | >= 2x | not measured here |  |  |" in page
    assert ("| kept | yes | maybe | NO |  |" in page) == (exit_code == 1)
    assert re.search(r"\| ratio \| >= 0\.01x \| \d\.\d\dx \(\d\.\d\d-\d+\.\d\d\) \| yes", page)
    assert "* A note." in page
