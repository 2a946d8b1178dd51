"""The documentation of the losses: its example of a new loss works as it stands there."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from student_train.losses import DIVERGENCES, config, reference
from student_train.losses.config import DivergenceConfig
from student_train.losses.reference import FORMULAS, dense_divergence
from student_train.losses.soft_term import make_divergence

PAGE = (Path(__file__).resolve().parents[3] / "docs/losses.md").read_text()
SECTION = PAGE[PAGE.index("## 11. How to add a loss") : PAGE.index("## 12.")]
EXACT = 1e-12
"""Sums of a dozen float64 terms."""


def blocks() -> tuple[str, str]:
    """The module and the config class."""
    found = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    module, options = found
    return module, "\n".join(line.removeprefix("   ") for line in options.splitlines())


def entry(text: str) -> str:
    """The right side of a dict entry that is given as code."""
    (found,) = re.findall(r'`"hellinger": (.*?),`', text[text.index("`" + '"hellinger"') :])[:1]
    return str(found)


def test_a_loss_added_as_described_works(monkeypatch: pytest.MonkeyPatch) -> None:
    source, options = blocks()
    module = ModuleType("student_train.losses.hellinger")
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    registry, formulas = SECTION.split("4. Add its definition")
    monkeypatch.setitem(DIVERGENCES, "hellinger", eval(entry(registry)))
    monkeypatch.setitem(FORMULAS, "hellinger", eval(entry(formulas), vars(reference)))
    names = dict(vars(config))
    exec(options, names)
    made: DivergenceConfig = names["HellingerConfig"]()
    teacher = torch.tensor([[0.7, 0.2, 0.0, 0.1]], dtype=torch.float64).log()
    student = torch.tensor([[0.3, 0.2, 0.1, 0.4]], dtype=torch.float64).log().requires_grad_()
    value, gradient = make_divergence(made)(teacher, student.detach())
    expected = dense_divergence(made, teacher, student, has_tail=True)
    torch.testing.assert_close(value, expected.detach(), rtol=0, atol=EXACT)
    (slope,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(gradient, slope, rtol=0, atol=EXACT)


def test_every_option_and_its_default_is_in_the_table() -> None:
    table = PAGE[PAGE.index("## 8. Divergences") : PAGE.index("### 8.1")]
    for name in DIVERGENCES:
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` ")]
        for option, default in config.soft_config(name).options().items():
            shown = str(default).lower() if isinstance(default, bool) else default
            text = f"`{option}: {shown:g}`" if isinstance(shown, float) else f"`{option}: {shown}`"
            assert text in row
