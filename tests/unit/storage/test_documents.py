"""The examples of ``docs/format.md`` and ``docs/store.md`` hold."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.mark.parametrize("name", ["format.md", "store.md"])
def test_the_examples_of_a_document_hold(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are plain Python with assertions, read from top to bottom."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / name).read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(examples) >= 9
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)  # our own document
