"""Every shipped example loads, and the prompts of the demo are what they claim to be."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from teacher_server.config import DataSource
from teacher_server.prompts import read_prompts

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
SPLITS = ["train", "heldout"]


def demo_rows(split: str) -> list[dict[str, Any]]:
    text = (ROOT / f"examples/demo/data/{split}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def prompt_of(row: dict[str, Any]) -> str:
    """The text of a row, without its case and spaces."""
    text = " ".join(message["content"] for message in row["messages"])
    return " ".join(text.lower().split())


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_an_example_loads_and_describes_students(path: Path) -> None:
    assert load_config(path).student_configs()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_prompt_files_of_an_example_that_are_ours_exist(path: Path) -> None:
    config = load_config(path)
    for source in (*config.data.train, *config.data.heldout):
        if source.path.startswith("examples/"):
            assert (ROOT / source.path).is_file(), source.path


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_of_the_demo_can_be_used(split: str) -> None:
    path = ROOT / f"examples/demo/data/{split}.jsonl"
    prompts = read_prompts([DataSource(path=str(path))], mode="generate")
    assert prompts.bad == []
    assert prompts.rows


def test_the_demo_is_large_enough_to_learn_from() -> None:
    assert len(demo_rows("train")) + len(demo_rows("heldout")) >= 300


def test_the_ids_of_the_demo_are_unique_over_both_splits() -> None:
    ids = [row["id"] for split in SPLITS for row in demo_rows(split)]
    assert len(ids) == len(set(ids))


def test_no_prompt_of_the_demo_is_asked_twice_or_in_both_splits() -> None:
    """A held-out prompt that was trained on measures memory."""
    prompts = [prompt_of(row) for split in SPLITS for row in demo_rows(split)]
    assert len(prompts) == len(set(prompts))
