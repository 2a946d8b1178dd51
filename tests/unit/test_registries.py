"""Every entry of a registry resolves, stays in its package, is tested and is documented."""

import importlib
import re
from pathlib import Path

import pytest

from pipeline.commands import COMMANDS
from storage.labels import LABEL_KINDS
from student_train.hard import HARD_TERMS
from student_train.losses import DIVERGENCES, LOSSES
from student_train.weights import WEIGHT_POLICIES
from teacher_server.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {
    ("student_train.losses", name): target for name, target in {**LOSSES, **DIVERGENCES}.items()
}
TARGETS |= {("student_train.weights", n): target for n, target in WEIGHT_POLICIES.items()}
TARGETS |= {("student_train.hard", n): target for n, target in HARD_TERMS.items()}
TARGETS |= {("teacher_server.backends", n): target for n, target in BACKENDS.items()}
TARGETS |= {("pipeline.commands", n): target for n, target in COMMANDS.items()}
TARGETS |= {
    ("storage.labels", name): f"{kind.__module__}:{kind.__name__}"
    for name, kind in LABEL_KINDS.items()
}
DOCUMENTED = sorted({*LOSSES, *DIVERGENCES, *WEIGHT_POLICIES, *HARD_TERMS})

entries = pytest.mark.parametrize(("package", "name"), TARGETS, ids="/".join)


@entries
def test_an_entry_resolves_to_something_callable_or_an_application(package: str, name: str) -> None:
    module, attribute = TARGETS[package, name].split(":")
    found = getattr(importlib.import_module(module), attribute)
    assert callable(found)
    assert found.__doc__


@entries
def test_an_entry_names_a_module_of_its_own_package(package: str, name: str) -> None:
    """Import strings are invisible to the import contracts."""
    assert TARGETS[package, name].startswith(f"{package}.")


@entries
def test_an_entry_has_a_test_file_of_its_name(package: str, name: str) -> None:
    """Commands that run models are called by name in a file that covers several of them."""
    folder = package.split(".")[0]
    files = [*(ROOT / "tests/unit" / folder).rglob("test_*.py")]
    files += (ROOT / "tests/integration").glob("test_*.py")
    named = [file for file in files if re.search(rf"_{name}(_|\.)", file.name)]
    if package == "pipeline.commands":
        named += [file for file in files if f'"{name}"' in file.read_text()]
    assert named, f"no test file covers {name!r}"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_loss_has_a_section_in_the_documentation(name: str) -> None:
    pages = [ROOT / "docs" / page for page in ("losses.md", "weights.md")]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    assert any(line.startswith("#") and f"`{name}`" in line for line in lines)
